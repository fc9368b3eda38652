"""Real English without a download: the docstrings of packages that are installed anyway.

Sources are read as text, never imported. In: nothing. Out: a list of documents, one docstring each,
the same list in the same order for the same installed versions.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path

PACKAGES = ("torch", "transformers", "numpy", "lightning", "datasets")
MIN_CHARACTERS = 80

_QUOTE = re.compile(r"\"{3}|'{3}")


@cache
def demo_documents() -> tuple[str, ...]:
    """Docstrings of the standard library and of `PACKAGES`, cleaned of indentation, without repetitions.

    Returns:
        At least 80 characters each; the standard library first, then the packages by name, files in the
        order of their paths, docstrings in the order of the file.
    """
    return tuple(dict.fromkeys(_docstrings()))


def source_versions() -> dict[str, str]:
    """The installed version of each package read: what `demo_documents` depends on."""
    import importlib.metadata
    import platform

    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _docstrings() -> Iterator[str]:
    for path in _source_files():
        for text in _triple_quoted(path.read_text(encoding="utf-8", errors="ignore")):
            document = cleandoc(text).strip()
            if len(document) >= MIN_CHARACTERS:
                yield document


def _triple_quoted(source: str) -> Iterator[str]:
    """The triple-quoted strings that open a line: docstrings, and bare strings, which read the same.

    The others are walked over in turn, so that a closing quote is never taken for an opening one.
    """
    position = 0
    while quote := _QUOTE.search(source, position):
        end = source.find(quote.group(), quote.end())
        if end < 0:
            return
        before = source[source.rfind("\n", 0, quote.start()) + 1 : quote.start()]
        if before.strip() in ("", "r", "R", "u"):
            yield source[quote.end() : end]
        position = end + 3


def _source_files() -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    yield from (
        path
        for path in sorted(library.rglob("*.py"))
        if not {"site-packages", "test", "tests"} & set(path.parts)
    )
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"'demo:docs' reads the docstrings of {name}, which is not installed: pip install {name}"
            )
        yield from sorted(Path(spec.origin).parent.rglob("*.py"))
