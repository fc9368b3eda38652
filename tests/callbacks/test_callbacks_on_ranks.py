"""Under DDP the callbacks write one set of files and logs, and no rank hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_ranks_write_one_set_of_files_and_end_together(
    lm_folder: str, texts: list[str], tmp_path: Path
) -> None:
    documents = tmp_path / "texts.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [
        sys.executable,
        "-m",
        "tests.support.callback_ranks_script",
        lm_folder,
        str(documents),
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "lightning_logs").iterdir()
    assert done.stdout.count("held-out FVU") == 1
    lines = [json.loads(line) for line in (run / "single_samples" / "samples.jsonl").open()]
    places = [(line["step"], line["position"]) for line in lines]
    assert len(set(places)) == len(places)  # one rank wrote
    assert {step for step, _ in places} == {5, 10, 15, 20}
    assert [json.loads(x)["step"] for x in (run / "loss_recovered.jsonl").open()] == [10, 20]
    latest = json.loads((run / "latent_statistics" / "latest.json").read_text())
    assert latest["heldout"]["rows"] == 400  # of both ranks together
    assert latest["training"]["rows"] == 3 * 2 * 32  # steps 12, 15, 18
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"] == 2 * 2 * 10 * 32
    assert summary["metrics"]["val/ce_recovered"] is not None
    assert json.loads((run / "top_tokens" / "latents.json").read_text())["rows"] == 10 * 32
