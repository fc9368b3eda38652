"""The command `latents` shows contexts of a finished run, and the report shows them too."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deeplens_lightning.cli.latents import holds_weights, latents
from deeplens_lightning.cli.main import main
from deeplens_lightning.cli.parser import option_types, with_lists
from deeplens_lightning.reporting.run_data import find_run, read_run
from tests.support.texts import texts, write_jsonl

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def test_numbers_after_a_list_option_are_its_values() -> None:
    for words in (["RUN", "--ids", "5", "17"], ["--ids", "5", "17", "RUN"], ["--ids=[5,17]", "RUN"]):
        joined = with_lists(words, option_types(latents))
        assert sorted(joined) == ["--ids=[5,17]", "RUN"]
    assert with_lists(["--ids", "5", "--keep", "3"], option_types(latents)) == ["--ids=[5]", "--keep", "3"]


def test_contexts_of_a_finished_run_are_printed_and_reported(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--config", str(QUICKSTART), *small, "--model.k=16"])
    capsys.readouterr()
    runs = tmp_path / "runs"
    main(["latents", str(runs), "--ids", "5", "17", "--keep=3"])
    printed = capsys.readouterr().out
    assert "latent 5, above 0 on" in printed
    assert "latent 17, above 0 on" in printed
    folder = find_run(runs)
    assert f"deeplens-lightning report {folder} shows these latents" in printed
    chosen = [entry for entry in read_run(folder).latents if entry["latent"] in (5, 17)]
    assert len(chosen) == 2
    assert all(len(entry["contexts"]) <= 3 and entry["step"] == 10 for entry in chosen)
    other = write_jsonl(tmp_path / "other.jsonl", texts(5, 300))
    main(["latents", str(runs), "--ids", "5", f"--dataset_name={other}", "--rows=30"])
    assert json.loads((folder / "chosen_latents" / "5.json").read_text())["rows"] == 30
    data = [word for word in small if word.startswith("--data") and "max_tokens" not in word]
    main(["extract", *data, f"--out={tmp_path / 'acts'}"])
    main(["latents", str(runs), "--ids", "17", f"--shards={tmp_path / 'acts'}"])
    assert json.loads((folder / "chosen_latents" / "17.json").read_text())["rows"] > 1000
    for words, message in (
        ([], "name the latents: --ids 5 17"),
        (["--ids", "100000"], r"latents=\[100000\] do not exist: this SAE has latents 0 to 255"),
        (["--ids", "5", "--sae", "k=4"], "names an SAE of a grid"),
        (["--ids", "5", "--dataset_name=/no/such.txt"], "matches no"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["latents", str(runs), *words])
    (tmp_path / "texts.jsonl").unlink()
    with pytest.raises(
        SystemExit, match=r"the data of the run cannot be opened again \(.*give --shards, or --hf_model"
    ):
        main(["latents", str(runs), "--ids", "5"])


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds no checkpoint: give one with --checkpoint FILE"):
        main(["latents", str(tmp_path), "--ids", "5"])


def test_the_newest_fit_is_taken_and_not_a_later_validation(tmp_path: Path) -> None:
    for number, files in enumerate((["a.ckpt"], ["summary.json"], [])):
        run = tmp_path / f"version_{number}"
        run.mkdir()
        for name in ["metrics.csv", *files]:
            (run / name).touch()
        os.utime(run, (number, number))
    assert find_run(tmp_path).name == "version_2"
    assert find_run(tmp_path, holds_weights).name == "version_1"
