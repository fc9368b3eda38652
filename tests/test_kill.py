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
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplens_lightning.newest import newest_checkpoint, with_newest

SCRIPT = Path(__file__).with_name("kill_script.py")


def start(folder: Path, lm: str, ranks: int) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        given = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
        if ranks > 1:
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
        command = [sys.executable, str(SCRIPT), str(folder), lm]
        processes.append(subprocess.Popen(command, env={**os.environ, **given}, stdout=log, stderr=log))
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


def kill_at_random(folder: Path, lm: str, ranks: int, kills: int) -> None:
    rng = random.Random(0)
    for _ in range(kills):
        before, more = len(lines(folder)), rng.randrange(1, 22)
        processes = start(folder, lm, ranks)
        while len(lines(folder)) < before + more:
            assert all(process.poll() is None for process in processes), logs(folder)
            time.sleep(0.01)
        time.sleep(rng.random() * 0.03)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
        metrics = folder / "metrics-0.jsonl"
        text = metrics.read_text()
        if not text.endswith("\n"):
            metrics.write_text(text + "\n")
    finish(folder, start(folder, lm, ranks))


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


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 6), (2, 5)])
def test_killed_runs_end_as_undisturbed_ones(ranks: int, kills: int, tiny: Any, tmp_path: Path) -> None:
    lm = tiny("gpt2")
    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    calm.mkdir()
    hunted.mkdir()
    finish(calm, start(calm, lm, ranks))
    kill_at_random(hunted, lm, ranks, kills)
    for rank in range(ranks):
        expected, found = (
            torch.load(folder / f"final-{rank}.pt", weights_only=True) for folder in (calm, hunted)
        )
        assert_equal(found, expected)
    for rank in range(ranks):
        last = {line["step"]: line for line in lines(hunted, rank)}
        assert last == {line["step"]: line for line in lines(calm, rank)}
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
