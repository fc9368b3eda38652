"""`ExportSAE`: write the trained SAEs at the end of a fit as folders that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from deeplens_lightning.callbacks.support import add_written, from_rank_zero
from deeplens_lightning.reporting.run_folder import run_folder
from deeplens_lightning.sae.interop.saelens import check_export
from deeplens_lightning.sae.training import DictionaryTraining

Format = Literal["saelens", "safetensors", "hub"]
_LOADERS = {"saelens": "sae_lens.SAE.load_from_disk", "safetensors": "SparseAutoencoder.from_safetensors"}


@runtime_checkable
class ExportsSAELens(Protocol):
    """A module that writes its SAEs in SAELens's layout; one folder, or a list of one for each SAE."""

    def export_saelens(self, folder: str | Path, *, overwrite: bool = False) -> Path | list[Path]:
        """Write a folder, or one for each SAE inside it."""


@runtime_checkable
class ExportsSafetensors(Protocol):
    """A module that writes its SAEs in this package's layout; one folder, or a list of one for each SAE."""

    def export_safetensors(self, folder: str | Path, *, overwrite: bool = False) -> Path | list[Path]:
        """Write a folder, or one for each SAE inside it."""


class ExportSAE(Callback):
    """Exports every SAE of the module when a fit has ended by itself, and says how to load it.

    The exported weights are the last ones, which `FitSummary` saves, too. A fit that was stopped exports nothing.

    Args:
        format: "saelens" is read by `sae_lens.SAE.load_from_disk`; "safetensors" by
            `SparseAutoencoder.from_safetensors`, with all architectures and the normalisation; "hub" is not there yet.
        folder: where to write; a relative path is inside the folder of the run. Several SAEs get a folder each in it.
        overwrite: replace the folder of an earlier fit.

    Raises:
        ValueError: an unknown format, or "hub".

    Attributes:
        written: the folders.
    """

    def __init__(
        self,
        format: Format = "saelens",  # noqa: A002  the word that a user looks for
        folder: str | Path = "sae",
        overwrite: bool = False,
    ) -> None:
        if format not in get_args(Format):
            raise ValueError(f"format={format!r} must be one of {', '.join(map(repr, get_args(Format)))}")
        if format == "hub":
            raise ValueError(
                "ExportSAE cannot upload to the Hugging Face hub yet: give format='saelens' and upload the folder with "
                "`hf upload REPOSITORY FOLDER`"
            )
        self.format: Format = format
        self.folder = Path(folder)
        self.overwrite = overwrite
        self.written: list[Path] = []
        self._target: Path | None = None  # None outside a fit that has begun to train

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._target = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before the first step what could not be exported after the last.

        Raises:
            FileExistsError: the folder exists and `overwrite` is False.
            TypeError: the module has no method for this export.
            ValueError: SAELens has no such architecture.
        """
        if not isinstance(pl_module, ExportsSAELens if self.format == "saelens" else ExportsSafetensors):
            raise TypeError(
                f"{type(pl_module).__name__} has no method export_{self.format}: remove ExportSAE, or give the module "
                "this method"
            )
        if self.format == "saelens" and isinstance(pl_module, DictionaryTraining):
            for sae in pl_module.dictionaries.values():
                check_export(sae)
        target = run_folder(trainer) / self.folder

        def check() -> None:
            if not self.overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise FileExistsError(
                    f"{target} exists already: give ExportSAE another folder, or overwrite=True to replace it"
                )

        from_rank_zero(trainer, check)
        self._target = target

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export: here, after every callback that replaces the weights by an average in its `on_train_end`."""
        if self._target is None or not trainer.is_global_zero:
            return
        found: Path | list[Path]
        if self.format == "saelens":
            assert isinstance(pl_module, ExportsSAELens)
            found = pl_module.export_saelens(self._target, overwrite=self.overwrite)
        else:
            assert isinstance(pl_module, ExportsSafetensors)
            found = pl_module.export_safetensors(self._target, overwrite=self.overwrite)
        folders = [found] if isinstance(found, Path) else found
        for folder in folders:
            add_written(self.written, folder)
        several = f" ({len(folders)} SAEs in {self._target})" if len(folders) > 1 else ""
        rank_zero_info(f'exported: load it with {_LOADERS[self.format]}("{folders[0]}"){several}')
