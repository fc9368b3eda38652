"""The commands, files and code of the README exist and run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deeplens_lightning.reporting.report import write_report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found is not None, name
    return found.group(1)


def test_the_readme_names_every_command_and_no_other() -> None:
    from deeplens_lightning.cli.main import OWN_COMMANDS, TRAINER_COMMANDS

    used = set(re.findall(r"deeplens-lightning (\w+)", README))
    assert used <= {*OWN_COMMANDS, *TRAINER_COMMANDS}
    assert set(OWN_COMMANDS) <= used


def test_the_readme_writes_no_cache_of_unsaid_size() -> None:
    for command in re.findall(r"deeplens-lightning extract [^`]*", README):
        assert "--max_rows" in command


def test_every_file_that_the_readme_names_exists() -> None:
    for path in re.findall(r"(?:configs|examples)/[\w./]+\.(?:yaml|py)", README):
        assert (ROOT / path).exists(), path


def test_the_quickstart_command_names_the_quickstart_config() -> None:
    assert "configs/quickstart.yaml" in block("quickstart")
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    assert settings["data"]["init_args"]["hf_model"] == "demo:lm"
    assert settings["data"]["init_args"]["val_rows"] >= 200_000
    assert settings["model"]["init_args"]["k"] <= 32


def test_the_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    code = block("python").replace("max_steps=300", "max_steps=3")
    code = code.replace("batch_size=2048", "batch_size=2048, val_rows=1000")
    assert len([line for line in code.splitlines() if line.strip()]) == 6
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert list(tmp_path.rglob("*.ckpt"))
    assert "held-out FVU" in out.stdout
    assert "val/fvu" in write_report(tmp_path).read_text()


@pytest.mark.slow
def test_the_example_of_a_users_own_sae_learns(tmp_path: Path) -> None:
    code = "import runpy; print('fvu', runpy.run_path('bring_your_own_sae.py')['main'](steps=40))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "examples", timeout=600
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert float(out.stdout.split("fvu")[-1]) < 0.9
