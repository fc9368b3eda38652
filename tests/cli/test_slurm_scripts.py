"""The SLURM scripts: bash accepts them, and the command line accepts the commands that they run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.parsing import parsed

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
FIRST_ARGUMENTS = {
    "one_node": "configs/gpt2_fineweb.yaml",
    "several_nodes": "configs/gpt2_fineweb.yaml",
    "sweep": "acts",
}


def commands(script: Path, folder: Path, **slurm: str) -> list[str]:
    """The words that the script hands to `srun`, for a run whose folder does not exist yet."""
    srun = folder / "bin" / "srun"
    srun.parent.mkdir(exist_ok=True)
    srun.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    path = {"PATH": f"{srun.parent}:{os.environ['PATH']}"}
    words = ["bash", str(script), FIRST_ARGUMENTS[script.stem], str(folder / "run")]
    done = subprocess.run(words, env={**path, **slurm}, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_valid_bash_and_requests_a_warning_signal_and_a_requeue(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    settings = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in settings
    assert any(line.startswith("#SBATCH --signal=SIGUSR1@") for line in settings)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_command_of_a_script_parses(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "3", "SLURM_ARRAY_TASK_ID": "7"}
    program, command, *words = commands(script, tmp_path, **slurm)
    assert (program, command) == ("deeplens-lightning", "fit")
    assert "configs/cluster/preemptible.yaml" in words
    monkeypatch.chdir(ROOT)
    settings = parsed(command, *words)
    trainer = settings["trainer"]
    run = tmp_path / "run" / ("7" if script.stem == "sweep" else "")
    assert Path(trainer["default_root_dir"]) == run
    assert {
        Path(each["init_args"]["dirpath"])
        for each in trainer["callbacks"]
        if "dirpath" in each.get("init_args", {})
    } == {run / "checkpoints"}
    assert f"newest:{run}" in words
    assert settings["ckpt_path"] == f"newest:{run}"
    devices = {"one_node": (4, 1, "ddp"), "several_nodes": (4, 3, "ddp"), "sweep": (1, 1, "auto")}
    assert (int(trainer["devices"]), trainer["num_nodes"], trainer["strategy"]) == devices[script.stem]


def test_every_task_of_the_sweep_trains_another_sae(tmp_path: Path) -> None:
    [script] = [path for path in SCRIPTS if path.stem == "sweep"]
    chosen = set()
    for task in range(10):
        words = commands(script, tmp_path, SLURM_ARRAY_TASK_ID=str(task))
        chosen.add((words[words.index("--model.k") + 1], words[words.index("--model.lr") + 1]))
    assert len(chosen) == 10
