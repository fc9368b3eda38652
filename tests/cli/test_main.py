"""Commands of the command line on real configs, and its errors for mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from deeplens_lightning.cli.main import lightning_cli, main
from tests.cli.parsing import parsed

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))  # those of configs/cluster: test_cluster_configs.py
Tiny = Callable[[str], str]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses(config: Path) -> None:
    settings, text = parsed("fit", "--config", str(config)), yaml.safe_load(config.read_text())
    for part in ("data", "model"):
        assert settings[part]["class_path"] == text[part]["class_path"]
        for name, value in text[part]["init_args"].items():
            found = settings[part]["init_args"][name]
            if name.endswith("_options"):  # the parser adds the defaults of the other options
                found = {option: found[option] for option in value}
            assert found == value


def test_quickstart_runs_in_process(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.fast_dev_run=2", *small])
    main(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *small])
    shown = capsys.readouterr().out
    for word in ("tokens", "tokens/s", "held-out FVU", "held-out L0", "dead latents", "written"):
        assert word in shown


@pytest.mark.parametrize("name", ["transcoder", "crosscoder", "grid"])
def test_demo_configs_run_in_process(name: str, tmp_path: Path) -> None:
    words = ["fit", "--config", str(ROOT / "configs" / f"{name}.yaml"), "--trainer.fast_dev_run=2"]
    main([*words, "--data.val_rows=2000", f"--trainer.default_root_dir={tmp_path}"])


def test_later_configs_and_options_override_earlier_ones(small: list[str], tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("data:\n  init_args:\n    batch_size: 32\nmodel:\n  init_args:\n    k: 7\n")
    words = [
        "--config",
        str(ROOT / "configs" / "quickstart.yaml"),
        *small,
        "--config",
        str(over),
        "--model.k=5",
    ]
    cli = lightning_cli(words, run=False)
    assert cli.datamodule.batch_size == 32  # type: ignore[attr-defined]
    assert cli.model.hparams["k"] == 5
    assert cli.model.hparams["d_in"] == 64  # linked from the data


def test_extract_then_train_without_a_model(small: list[str], tmp_path: Path, tiny: Tiny) -> None:
    out = tmp_path / "acts"
    data = [word for word in small if word.startswith("--data")]
    data = [word for word in data if "max_tokens" not in word]
    main(["extract", *data, f"--out={out}"])
    assert json.loads((out / "manifest.json").read_text())["hook_points"]
    main(["verify", str(out)])
    live_only = (
        "--data.hf_model",
        "--data.dataset_name",
        "--data.layer",
        "--data.seq_length",
        "--data.buffer_size",
    )
    words = [word for word in small if not word.startswith(live_only)]
    cached = ["--config", str(ROOT / "configs" / "cached.yaml"), f"--data.shards={out}"]
    main(["fit", *cached, *words, "--data.hf_model=/nowhere"])
    with pytest.raises(SystemExit, match=r"hook_points|hook points"):
        main(["extract", *data, "--data.layer=0", f"--out={out}"])
    shard = next(out.glob("*.pt"))
    damaged = bytearray(shard.read_bytes())
    damaged[-100] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(SystemExit, match="1 problem"):
        main(["verify", str(out)])


def test_deeplens_own_file_trains_through_one_line_of_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = tmp_path / "features_layer_3_25000.pt"
    codes = torch.randn(25_000, 12).relu() * (torch.rand(25_000, 12) < 0.3)
    torch.save(codes @ torch.randn(12, 40) + 1, features)
    config = yaml.safe_load((ROOT / "configs" / "cached.yaml").read_text())
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "runs")
    config["data"]["init_args"]["shards"] = str(features)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path), "--data.max_tokens=400000", "--trainer.accelerator=cpu"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    fvu = re.search(r"held-out FVU\W+([\d.]+)", shown)
    assert fvu is not None, shown
    assert float(fvu[1]) < 0.2


def test_extract_plan_writes_nothing(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [word for word in small if word.startswith("--data") and "max_tokens" not in word]
    main(["extract", *data, f"--out={tmp_path / 'acts'}", "--plan"])
    assert "bytes on disk" in capsys.readouterr().out
    assert not (tmp_path / "acts").exists()


def test_bench_prints_both_and_the_ratio(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [word for word in small if word.startswith("--data") and "max_tokens" not in word]
    main(
        [
            "bench",
            *data,
            "--data.hook=[mlp_out,resid_pre]",
            "--pairs=2",
            "--model_batches=3",
            f"--out={tmp_path / 'b.json'}",
        ]
    )
    assert "stream / bare" in capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    assert len(found["bare"]) == len(found["stream"]) == 2


def test_inspect_and_report(
    tiny: Tiny, small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", tiny("llama")])
    assert "mlp_out" in capsys.readouterr().out
    main(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *small])
    main(["report", str(tmp_path / "runs")])
    assert any((tmp_path / "runs").rglob("report.html"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data.hf_model=/no/such/folder"], "there is no such folder"),
        (["--data.layer=99"], "layers 0 to 2"),
        (["--data.hook=mlp_uot"], "mlp_out"),
        (["--data.dataset_name=/no/such/*.jsonl"], "matches no"),
        (["--data.text_column=body"], "its columns are text"),
        (["--data.dataset_name=[' ', '   ']"], "no rows to train on"),
        (["--data.buffer_size=16"], "buffer_size=16 is below batch_size=64"),
        (["--data.seq_length=4096"], "exceeds the model's 256 positions"),
        (["--data.max_tokens=3"], "an epoch would have no batch"),
        (["--data.normalize=unit"], "normalize"),
        (["--model.d_in=7"], "d_in is taken from the data"),
        (["--data.buffer_sise=1024"], "buffer_sise"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_gives_one_sentence_with_the_fix_and_no_traceback(
    small: list[str], change: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *small, *change])
    assert exit_.value.code not in (0, None)
    said = f"{exit_.value.code} {capsys.readouterr().err}"
    assert words in said
    assert "Traceback" not in said


def test_shards_that_do_not_exist_are_named() -> None:
    with pytest.raises(SystemExit, match="/no/such/cache"):
        main(["fit", "--config", str(ROOT / "configs" / "cached.yaml"), "--data.shards=/no/such/cache"])


def test_a_mistake_in_a_real_process_exits_non_zero_without_a_traceback() -> None:
    words = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--data.hf_model=/no/such/folder"]
    command = [sys.executable, "-m", "deeplens_lightning", *words]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.returncode == 1
    assert "there is no such folder" in out.stderr
    assert "Traceback" not in out.stderr
    asked = subprocess.run([*command[:3], "--traceback", *words], capture_output=True, text=True, timeout=600)
    assert "Traceback" in asked.stderr


def test_an_unknown_command_lists_the_commands() -> None:
    with pytest.raises(SystemExit, match=r"there is no command 'trian'; the commands are fit, .*verify"):
        main(["trian"])
