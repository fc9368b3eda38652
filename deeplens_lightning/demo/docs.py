"""The `demo:docs` dataset: docstrings of installed packages, as English text that needs no download.

In: nothing. Out: a list of documents, one docstring each. The same installed versions give the same list in the same
order. The packages' files are read as text and not imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path

PACKAGES = ("torch", "transformers", "numpy", "lightning", "datasets")
"""Packages whose docstrings are read, besides the standard library."""

MIN_CHARACTERS = 80
"""Shorter docstrings are left out."""

_QUOTE = re.compile(r"\"{3}|'{3}")


@cache
def demo_documents() -> tuple[str, ...]:
    """Docstrings of the standard library and of `PACKAGES`, without indentation and without duplicates.

    Returns:
        Docstrings of at least `MIN_CHARACTERS` characters: first those of the standard library, then those of each
        package in the order of `PACKAGES`; files in the order of their paths, docstrings in the order of the file.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    return tuple(dict.fromkeys(_docstrings()))


def source_versions() -> dict[str, str]:
    """The versions that `demo_documents` depends on, of Python and of `PACKAGES`, by name."""
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
    """The triple-quoted strings that start a line: docstrings, and other bare strings, which look the same.

    Triple-quoted strings elsewhere are skipped whole, so that their closing quote does not count as an opening one.
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
