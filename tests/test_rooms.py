"""Structure of the package: imports run downwards, files are short, and the map in the docs names every file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deeplens_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
MAP = ROOT / "docs" / "pages" / "internals.md"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package in `folder`, with the contract of this project."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    return subprocess.run(
        [*command, "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_imports_run_downwards_and_nothing_is_exempt() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("text/packing.py", "from deeplens_lightning.model import rows"),
        ("types.py", "from deeplens_lightning import normalization"),
        ("stream/loader.py", "def late() -> None:\n    from deeplens_lightning.sae import module"),
        (
            "shards/codec.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from deeplens_lightning.text import sources",
        ),
    ],
    ids=["upwards", "sideways", "inside a function", "for types alone"],
)
def test_an_upward_or_sideways_import_is_found(where: str, line: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("lm", "__pycache__"))
    planted = tmp_path / PACKAGE.name / where
    planted.write_text(f"{planted.read_text()}\n\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "is not allowed to import" in done.stdout


def test_files_are_short_and_few_are_at_the_root() -> None:
    lengths = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in FILES}
    assert {path: n for path, n in lengths.items() if n > 350} == {}
    assert lengths[Path("datamodule.py")] <= 250
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_the_package_has_fewer_than_15_getattr() -> None:
    reaches = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bgetattr\(", line)
    ]
    assert len(reaches) < 15, "\n".join(reaches)


def test_the_map_names_every_file_once_and_no_other() -> None:
    named = re.findall(r"^\| `([\w/]+\.py)` \|", MAP.read_text(), re.MULTILINE)
    there = [str(path.relative_to(PACKAGE)) for path in FILES if path.name != "__init__.py"]
    assert sorted(named) == sorted(there)
