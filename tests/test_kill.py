"""Killed at random moments and started again, as often as it takes: the end is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint, with_newest

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
Start = Callable[[], list[subprocess.Popen[bytes]]]


def start_quickstart(folder: Path) -> list[subprocess.Popen[bytes]]:
    """The command line's own training, with a shorter run and a checkpoint every third step."""
    config = yaml.safe_load(QUICKSTART.read_text())
    config["trainer"]["max_steps"] = 36
    config["trainer"]["log_every_n_steps"] = 1
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder / "runs")
    config["data"]["init_args"] |= {"val_rows": 4000, "device": "cpu"}
    *_, saving = callbacks = config["trainer"]["callbacks"]
    saving["init_args"]["every_n_train_steps"] = 3
    noting = {
        "class_path": "tests.support.kill_script.Metrics",
        "init_args": {"path": str(folder / "metrics-0.jsonl")},
    }
    callbacks.append(noting)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", str(folder / "config.yaml"), "--trainer.accelerator=cpu"]
    words += ["--ckpt_path", f"newest:{folder / 'runs'}"]
    command = [sys.executable, "-m", "deeplens_lightning", "--traceback", *words]
    log = (folder / "log-0.txt").open("ab")
    return [subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)]


def start_ranks(folder: Path, lm: str, ranks: int) -> list[subprocess.Popen[bytes]]:
    """The same small training on each rank, as torchrun would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        given = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
        given |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
        log = (folder / f"log-{rank}.txt").open("ab")
        command = [sys.executable, "-m", "tests.support.kill_script", str(folder), lm]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env={**os.environ, **given}, stdout=log, stderr=log)
        )
    return processes


def finish(folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    codes = [process.wait(timeout=400) for process in processes]
    assert not any(codes), logs(folder)


def logs(folder: Path) -> str:
    return "\n\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log-*.txt")))


def lines(folder: Path, rank: int = 0) -> list[dict[str, float]]:
    path = folder / f"metrics-{rank}.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0].splitlines()  # a kill can cut the last line off
    return [json.loads(line) for line in whole if line.endswith("}")]


def kill_at_random(folder: Path, begin: Start, kills: int, steps: int) -> None:
    rng = random.Random(0)
    for _ in range(kills):
        before, more = len(lines(folder)), rng.randrange(1, steps)
        processes = begin()
        while len(lines(folder)) < before + more:
            assert all(process.poll() is None for process in processes), logs(folder)
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
        metrics = folder / "metrics-0.jsonl"
        text = metrics.read_text()
        if not text.endswith("\n"):
            metrics.write_text(text + "\n")
    finish(folder, begin())


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_metrics(found: Path, expected: Path, rank: int = 0) -> None:
    """Line by line; of a step that was done again, the last counts."""
    last = {line["step"]: line for line in lines(found, rank)}
    assert last == {line["step"]: line for line in lines(expected, rank)}


@pytest.mark.slow
def test_the_killed_quickstart_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    ends = []
    for folder, kills in ((calm, 0), (hunted, 5)):
        folder.mkdir()
        kill_at_random(folder, partial(start_quickstart, folder), kills, steps=9)
        newest = newest_checkpoint(folder)
        assert newest is not None, logs(folder)
        ends.append(torch.load(newest, weights_only=True))
    for end in ends:
        assert end["global_step"] == 36
        end["callbacks"] = {key: x for key, x in end["callbacks"].items() if "ModelCheckpoint" not in key}
        end.pop("loops")  # how often something was started is in there, too
    assert_equal(ends[1], ends[0])
    assert_same_metrics(hunted, calm)
    assert len(lines(hunted)) > len(lines(calm)), "some steps were done again"


@pytest.mark.slow
def test_killed_ranks_end_as_undisturbed_ones(tiny: Any, tmp_path: Path) -> None:
    lm = tiny("gpt2")
    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    for folder, kills in ((calm, 0), (hunted, 5)):
        folder.mkdir()
        kill_at_random(folder, partial(start_ranks, folder, lm, 2), kills, steps=22)
    for rank in range(2):
        expected, found = (
            torch.load(folder / f"final-{rank}.pt", weights_only=True) for folder in (calm, hunted)
        )
        assert_equal(found, expected)
        assert_same_metrics(hunted, calm, rank)
    assert len(lines(hunted)) > len(lines(calm)), "some steps were done again"


def checkpoint(path: Path, age: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"loops": {}, "state_dict": {"w": torch.randn(5000)}}, path)
    os.utime(path, ns=(10**18 - age, 10**18 - age))
    return path


def test_the_newest_checkpoint_that_loads_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    old = checkpoint(tmp_path / "version_0" / "step=3.ckpt", 30)
    new = checkpoint(tmp_path / "version_1" / "step=6.ckpt", 20)
    assert newest_checkpoint(tmp_path) == new
    cut = checkpoint(tmp_path / "last.ckpt", 10)
    cut.write_bytes(cut.read_bytes()[:9000])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "words.ckpt").write_text("no checkpoint")
    torch.save({"a": 1}, tmp_path / "weights alone.ckpt")
    assert newest_checkpoint(tmp_path) == new
    flipped = bytearray(new.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    new.write_bytes(bytes(flipped))
    assert newest_checkpoint(tmp_path) == old
    shutil.rmtree(old.parent)
    assert newest_checkpoint(tmp_path) is None


def test_the_command_line_asks_for_the_newest(tmp_path: Path) -> None:
    words = ["fit", "--ckpt_path", f"newest:{tmp_path}", "--seed", "1"]
    assert with_newest(words) == ["fit", "--seed", "1"], "a first start"
    path = checkpoint(tmp_path / "a.ckpt", 0)
    assert with_newest(words) == ["fit", f"--ckpt_path={path}", "--seed", "1"]
    assert with_newest(["fit", f"--ckpt_path=newest:{tmp_path}"]) == ["fit", f"--ckpt_path={path}"]
    assert with_newest(["fit", "--ckpt_path", "other.ckpt"]) == ["fit", "--ckpt_path", "other.ckpt"]
