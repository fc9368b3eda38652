"""A matplotlib figure that a notebook shows as a picture, whether or not pyplot was imported."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure with the method that IPython calls to show an object as a picture.

    IPython knows how to show a `Figure` only after pyplot was imported in the notebook. Where it does, it uses its own
    way in place of this method.
    """

    def _repr_png_(self) -> bytes:
        """The figure as the bytes of a PNG file."""
        file = BytesIO()
        self.canvas.print_figure(file, format="png")
        return file.getvalue()
