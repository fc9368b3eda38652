"""Exit codes of real processes that signals stop, and one sentence for what the user or the system did wrong."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deeplens_lightning.callbacks import Preemption
from deeplens_lightning.cli.main import main
from deeplens_lightning.disk.mistakes import mistakes, naming, sentence
from deeplens_lightning.shards import ShardError, ShardStream, ShardWriter
from tests.support.caches import feed, make_rows, manifest, write_cache
from tests.support.ranks import ROOT, start
from tests.support.texts import texts, write_jsonl

MODULE = [sys.executable, "-m", "deeplens_lightning"]


def with_ctrl_c() -> None:
    """Let SIGINT stop the process that is about to start; a job in the background of a shell ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODULE, *words], cwd=ROOT, capture_output=True, text=True, timeout=600, **options)  # type: ignore[call-overload, no-any-return]


def stopped_at(number: int, small: list[str], rank: int = 0) -> list[str]:
    """Words of a fit that gets a signal at its third batch."""
    return [
        "fit",
        *small,
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks=tests.support.signalling.SendSignal",
        f"--trainer.callbacks.number={number}",
        "--trainer.callbacks.batch=2",
        f"--trainer.callbacks.rank={rank}",
    ]


@pytest.fixture
def words(small: list[str]) -> list[str]:
    return [word for word in small if "logger" not in word and "max_tokens" not in word]


def test_sigterm_in_this_process_saves_and_exits_with_143(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        main(stopped_at(signal.SIGTERM, words))
    assert exit_.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert torch.load(tmp_path / "runs" / Preemption.FILE, weights_only=True)["global_step"] == 3
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143(words: list[str], tmp_path: Path) -> None:
    ended = run(*stopped_at(signal.SIGTERM, words))
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert "stopped by SIGTERM" in ended.stderr
    assert "Traceback" not in ended.stderr
    saved = torch.load(tmp_path / "runs" / Preemption.FILE, weights_only=True)
    assert saved["global_step"] == 3


@pytest.mark.slow
def test_ctrl_c_exits_with_130(words: list[str]) -> None:
    ended = run(*stopped_at(signal.SIGINT, words), preexec_fn=with_ctrl_c)
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
    assert "stopped by Ctrl-C" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    slow = tmp_path / "first" / "jsonargparse"
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'importing')!r}).touch()\ntime.sleep(3600)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{slow.parent}:{ROOT}"}
    process = subprocess.Popen(
        [*MODULE, "fit", "--config", "configs/quickstart.yaml"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=with_ctrl_c,
    )  # fmt: skip
    while not (tmp_path / "importing").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=60)
    assert (process.returncode, shown, said) == (130, "", "stopped by Ctrl-C\n")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_exits_with_143(words: list[str], tmp_path: Path, rank: int) -> None:
    given = [*stopped_at(signal.SIGTERM, words, rank), "--trainer.devices=2", "--trainer.strategy=ddp"]
    ranks = start("deeplens_lightning", *given, folder=tmp_path, ranks=2)
    assert [process.wait(300) for process in ranks] == [143, 143]
    assert (tmp_path / "runs" / Preemption.FILE).exists()


@pytest.mark.slow
def test_the_rank_that_lightning_started_the_others_from_exits_with_143(
    words: list[str], tmp_path: Path
) -> None:
    ended = run(*stopped_at(signal.SIGTERM, words), "--trainer.devices=2", "--trainer.strategy=ddp")
    assert ended.returncode == 143, ended.stderr
    assert (tmp_path / "runs" / Preemption.FILE).exists()


@pytest.mark.slow
def test_extract_stopped_by_sigterm_keeps_its_rows_and_exits_with_143(
    words: list[str], tmp_path: Path
) -> None:
    out, many = tmp_path / "acts", write_jsonl(tmp_path / "many.jsonl", texts(80, 900) * 60)
    data = [word for word in words if word.startswith("--data") and "dataset_name" not in word]
    given = ["extract", *data, f"--data.dataset_name={many}", f"--out={out}", "--shard_bytes=100000"]
    process = subprocess.Popen([*MODULE, *given], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("*.pt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143, said
    assert "stopped by SIGTERM" in said
    assert not list(out.glob(".writing-*"))
    assert ShardStream(out, batch_size=1).rows > 0


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_sentence_with_its_file(
    words: list[str], tmp_path: Path
) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    settings = ["--trainer.logger=false", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    data = [word for word in words if "dataset_name" not in word]  # `datasets` would write a file of its own
    ended = run("fit", *data, *settings, preexec_fn=small_files)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'runs'}")
    assert ".ckpt: File too large: raise the limit" in last


@pytest.mark.slow
def test_a_dataset_that_does_not_fit_on_the_disk_is_one_sentence(words: list[str], tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    ended = run("fit", *words, preexec_fn=small_files, env=os.environ | {"HF_HOME": str(tmp_path / "hub")})
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "File too large: raise the limit" in last
    assert "Traceback" not in ended.stderr


def _kinds(tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Paths that cannot be read, each with the words of its sentence."""
    write_cache(tmp_path / "acts", n=600)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "manifest.json").symlink_to("manifest.json")
    (tmp_path / "folders" / "manifest.json").mkdir(parents=True)
    return {
        "below a file": (f"{tmp_path}/file/acts", "matches nothing"),
        "a loop": (f"{tmp_path}/loop", "loop"),
        "a loop inside": (f"{tmp_path}/inner", "no manifest.json and no .pt file"),
        "a name too long": (f"{tmp_path}/{'x' * 300}", "give a shorter path"),
        "a folder for a file": (f"{tmp_path}/folders", "no manifest.json and no .pt file"),
        "a server that is not there": ("http://127.0.0.1:9/acts", "check the address"),
        "no such protocol": ("nosuch://host/acts", "Protocol not known"),
    }


def test_paths_that_cannot_be_read_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deeplens_lightning.shards.patience.WAITS", (0.0, 0.0))
    for where, words in _kinds(tmp_path).values():
        with pytest.raises(SystemExit) as exit_:
            main(["verify", where])
        said = str(exit_.value.code)
        assert words in said
        assert where in said
        assert "Errno" not in said
        with pytest.raises((ShardError, OSError)) as error:
            ShardStream(where, batch_size=1)
        assert isinstance(error.value, ShardError) or error.value.filename


@pytest.mark.parametrize("where", ["file/acts", "loop/acts", "x" * 300, "/sys/acts", "/proc/acts"])
def test_folders_that_cannot_be_written_are_named(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match=r"Errno") as error:
        ShardWriter(tmp_path / where, manifest())
    said = sentence(error.value)
    assert said.startswith(str(tmp_path / where))
    assert "Errno" not in said


def test_a_done_mark_that_does_not_fit_on_the_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(tmp_path, manifest(), shard_bytes=100 * manifest().row_bytes) as writer:
        feed(writer, *make_rows(300))
        writer.sync()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as error:
                writer.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(error.value.filename).startswith(str(tmp_path))
    with ShardWriter(tmp_path, manifest(), shard_bytes=100 * manifest().row_bytes) as writer:
        writer.finish()
        assert writer.complete


def test_every_error_of_the_system_is_one_sentence() -> None:
    for number, place in itertools.product(errno.errorcode, ([], ["/some/file"])):
        error = OSError(number, os.strerror(number), *place)
        said = sentence(error)
        assert isinstance(error, mistakes())
        assert os.strerror(number) in said
        assert "[Errno" not in said
        assert ": " in said.split(os.strerror(number))[1]
        assert error.filename is None or said.startswith("/some/file: ")


def test_a_file_is_named_only_if_the_error_names_none() -> None:
    with pytest.raises(OSError, match="/mine"), naming("/mine"):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="/its"), naming("/mine"):
        raise OSError(errno.ENOSPC, "full", "/its")
