"""Files are whole under their names after a kill at any step; nothing in the package changes a disk by another way."""

from __future__ import annotations

import ast
import os
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from deeplens_lightning.disk.files import make_folder, write_whole
from deeplens_lightning.reporting.run_folder import append_jsonl, read_jsonl
from deeplens_lightning.sae.interop.files import fresh_folder
from tests.support.kills import killed, steps_of

PACKAGE = Path(__file__).parents[2] / "deeplens_lightning"
CHANGING = {"write_text", "write_bytes", "unlink", "mkdir", "makedirs", "rmtree", "rename", "truncate"}
CHANGING |= {"remove_tree", "savefig", "imsave", "symlink_to", "touch", "copyfile", "put_file", "rm", "mv"}
KNOWN = {
    ("shards/remote.py", "makedirs"),  # each with an `announce` before it
    ("shards/remote.py", "rm"),
    ("shards/remote.py", "mv"),
    ("shards/folder.py", "copyfile"),  # a download, which is announced by who asks for it
    ("disk/locks.py", "open"),  # files that are locked and never read
    ("disk/locks.py", "rmtree"),  # temporary folders
    ("cli/doctor/ranks.py", "open"),  # a log in a temporary folder
    ("reporting/drawing.py", "savefig"),  # to a file that `write_whole` opened
    ("reporting/figures.py", "imsave"),
}


def changes(path: Path) -> set[tuple[str, str]]:
    """File and name of every call that changes a file and is not one of `disk.files`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        given = [
            arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ]
        writes = name == "open" and any(set(mode) & set("wax+") and len(mode) < 4 for mode in given)
        renames = name == "replace" and method and len(node.args) == 1 and not node.keywords
        if writes or renames or (method and name in CHANGING):
            found.add((str(path.relative_to(PACKAGE)), name))
    return found


def test_every_change_of_a_disk_goes_through_one_module() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE) != Path("disk/files.py")]
    assert set().union(*map(changes, files)) - KNOWN == set()


def test_a_file_killed_at_any_step_holds_the_old_content_or_the_new(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    old, new = b"old" * 10, b"new" * 1000
    path = tmp_path / "a" / "b" / "file.json"
    steps = [step for step, _ in steps_of(partial(write_whole, path, old))]
    made = ["make folder", "sync folder"] * 2
    assert steps == [*made, "create", "write", "inside write", "sync", "replace", "sync folder"]
    for at in range(6):
        killed(at, partial(write_whole, path, new), processes)
        assert path.read_bytes() == (new if at == 5 else old)
        write_whole(path, old)
        assert [each.name for each in path.parent.iterdir()] == ["file.json"]


def test_an_error_while_a_file_is_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with pytest.raises(ZeroDivisionError):
        write_whole(path, lambda file: file.write(b"x" * 10) / 0)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to_as_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_folder_is_created_with_its_parents_and_a_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


def export(folder: Path, value: float) -> None:
    with fresh_folder(folder, overwrite=True) as new:
        for name in ("config", "weights"):
            (new / name).write_text(str(value))


def test_an_exported_folder_killed_at_any_step_is_whole_or_not_there(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    counted = tmp_path / "counted" / "sae"
    export(counted, 1.0)
    steps = [step for step, _ in steps_of(partial(export, counted, 2.0))]
    assert steps.count("replace") == 2
    for at in range(1, len(steps) + 1):
        folder = tmp_path / str(at) / "sae"
        export(folder, 1.0)
        killed(at - 1, partial(export, folder, 2.0), processes)
        if folder.exists():
            assert {name.name for name in folder.iterdir()} == {"config", "weights"}
            assert len({name.read_text() for name in folder.iterdir()}) == 1
        else:  # between two renames, and the old folder is beside it
            [old] = folder.parent.glob(".sae-*/old")
            assert {name.read_text() for name in old.iterdir()} == {"1.0"}


def test_lines_appended_after_a_line_that_a_kill_cut_off_are_read(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    append_jsonl(path, [{"step": 1}, {"step": 2, "text": "ä\ud800"}])
    with path.open("a") as file:
        file.write('{"step": 3, "a"')
    append_jsonl(path, [{"step": 3}])
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3]
