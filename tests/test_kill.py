"""A training that is killed at random moments and started again ends like one that ran without a stop."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deeplens_lightning.cli.newest_checkpoint import newest_checkpoint
from tests.support.killed_training import STOP_AFTER
from tests.support.ranks import HANGS, ROOT, start

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
Start = Callable[..., list[subprocess.Popen[bytes]]]


def start_quickstart(folder: Path, **environment: str) -> list[subprocess.Popen[bytes]]:
    """Start the quickstart from the command line, shorter and with a checkpoint every third step."""
    config = yaml.safe_load(QUICKSTART.read_text())
    config["trainer"]["max_steps"] = 36
    config["trainer"]["log_every_n_steps"] = 1
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder / "runs")
    config["data"]["init_args"] |= {"val_rows": 4000, "device": "cpu"}
    *_, saving = callbacks = config["trainer"]["callbacks"]
    saving["init_args"]["every_n_train_steps"] = 3
    metrics = {
        "class_path": "tests.support.killed_training.Metrics",
        "init_args": {"path": str(folder / "metrics-0.jsonl")},
    }
    callbacks.append(metrics)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--traceback", "fit", "--config", str(folder / "config.yaml"), "--trainer.accelerator=cpu"]
    words += ["--ckpt_path", f"newest:{folder / 'runs'}"]
    return start("deeplens_lightning", *words, folder=folder, **environment)


def finish(folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    codes = [process.wait(HANGS) for process in processes]
    assert not any(codes), logs(folder)


def logs(folder: Path) -> str:
    return "\n\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log-*.txt")))


def lines(folder: Path, rank: int = 0) -> list[dict[str, float]]:
    path = folder / f"metrics-{rank}.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0].splitlines()  # a kill can cut the last line off
    return [json.loads(line) for line in whole if line.endswith("}")]


def kill_at_random(folder: Path, begin: Start, kills: int, most: int) -> None:
    """Kill a run `kills` times, each time when it has written 1 to `most` lines, and then let it end.

    A run blocks three lines later, so that it cannot end before it is killed.
    """
    rng = random.Random(0)
    for _ in range(kills):
        before, more = len(lines(folder)), rng.randrange(1, most + 1)
        processes = begin(folder=folder, **{STOP_AFTER: str(more + 3)})
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
    finish(folder, begin(folder=folder))


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
    """Compare line by line; of a step that was done again, the last line counts."""
    last = {line["step"]: line for line in lines(found, rank)}
    assert last == {line["step"]: line for line in lines(expected, rank)}


@pytest.mark.slow
def test_a_killed_quickstart_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    ends = []
    for folder, kills in ((undisturbed, 0), (killed, 5)):
        folder.mkdir()
        kill_at_random(folder, start_quickstart, kills, most=3)
        newest = newest_checkpoint(folder)
        assert newest is not None, logs(folder)
        ends.append(torch.load(newest, weights_only=True))
    for end in ends:
        assert end["global_step"] == 36
        end["callbacks"] = {key: x for key, x in end["callbacks"].items() if "ModelCheckpoint" not in key}
        end.pop("loops")  # these count how often something was started
        del end["fit_summary"]["seconds"], end["fit_summary"]["folder"]  # each process has its own
    assert_equal(ends[1], ends[0])
    assert_same_metrics(killed, undisturbed)
    assert len(lines(killed)) > len(lines(undisturbed)), "no step was done again"


@pytest.mark.slow
def test_killed_ranks_end_like_undisturbed_ones(tiny: Any, tmp_path: Path) -> None:
    lm = tiny("gpt2")

    def two_ranks(folder: Path, **environment: str) -> list[subprocess.Popen[bytes]]:
        module = "tests.support.killed_training"
        return start(module, str(folder), lm, folder=folder, ranks=2, **environment)

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder, kills in ((undisturbed, 0), (killed, 5)):
        folder.mkdir()
        kill_at_random(folder, two_ranks, kills, most=12)
    for rank in range(2):
        expected, found = (
            torch.load(folder / f"final-{rank}.pt", weights_only=True) for folder in (undisturbed, killed)
        )
        assert_equal(found, expected)
        assert_same_metrics(killed, undisturbed, rank)
    assert len(lines(killed)) > len(lines(undisturbed)), "no step was done again"
