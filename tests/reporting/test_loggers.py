"""Each logger gets what it can show, and files of the run's folder can be read back."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from deeplens_lightning.reporting.loggers import log_image, log_scalars, log_table, markdown_table
from deeplens_lightning.reporting.run_folder import append_jsonl, read_jsonl, run_folder, write_json

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8)
COLUMNS = ["token", "norm"]
ROWS = [["<b>a|b</b>", 1.5], ["\u202e[x](y)\nz", None]]


def _log_everything(logger: Logger) -> None:
    log_scalars([logger], {"sample/norm": 1.5}, step=7)
    log_image([logger], "sample/heatmap", PIXELS, step=7)
    log_table([logger], "sample/tokens", COLUMNS, ROWS, step=7)


def test_tensorboard_reads_back_scalar_image_and_table(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    _log_everything(logger)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert [(e.step, e.value) for e in events.Scalars("sample/norm")] == [(7, 1.5)]
    image = events.Images("sample/heatmap")[0]
    assert (image.step, image.width, image.height) == (7, 30, 20)
    text = events.Tensors("sample/tokens/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "&lt;b&gt;a\\|b&lt;/b&gt;" in text
    assert "<b>" not in text


def test_wandb_offline_takes_image_and_table(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = WandbLogger(project="deeplens", offline=True, save_dir=str(tmp_path))
    _log_everything(logger)
    logger.experiment.finish()
    media = {path.suffix for path in tmp_path.rglob("media/**/*") if path.is_file()}
    assert media == {".png", ".json"}
    table = json.loads(next(tmp_path.rglob("*.table.json")).read_text())
    assert table["data"] == ROWS


def test_mlflow_file_store_takes_image_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("deeplens", tracking_uri=f"file:{tmp_path}")
    _log_everything(logger)
    artifacts = tmp_path / str(logger.name) / str(logger.version) / "artifacts"
    assert list(artifacts.glob("images/*.png"))
    assert json.loads((artifacts / "sample/tokens/step_7.json").read_text())["data"] == ROWS
    assert run_folder(L.Trainer(logger=logger)) == artifacts.parent


def test_a_logger_without_images_gets_the_scalars_and_one_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deeplens_lightning.reporting.loggers._reported", set())
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        _log_everything(logger)
        _log_everything(logger)
    logger.save()
    assert "sample/norm" in (Path(logger.log_dir) / "metrics.csv").read_text()
    assert sum("takes numbers only" in message for message in caplog.messages) == 1


def test_markdown_is_cut_and_says_where_the_rest_is() -> None:
    text = markdown_table(["n"], [[i] for i in range(510)])
    assert "| 499 |" in text
    assert "10 more rows" in text


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger])
def test_the_run_folder_is_the_loggers_own(tmp_path: Path, make: type[CSVLogger]) -> None:
    logger = make(tmp_path, name="mine")
    assert run_folder(L.Trainer(logger=logger)) == tmp_path / "mine" / "version_0"


def test_without_a_logger_the_run_folder_is_the_root(tmp_path: Path) -> None:
    assert run_folder(L.Trainer(logger=False, default_root_dir=tmp_path)) == tmp_path


def test_jsonl_survives_any_text_numbers_and_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    append_jsonl(
        path, [{"token": "\u2028\x00😀\ud800", "norm": float("nan")}, {"values": [1.0, float("inf")]}]
    )
    with path.open("a") as file:
        file.write('{"half": ')
    assert list(read_jsonl(path))[1] == {"values": [1.0, None]}
    assert next(iter(read_jsonl(path)))["norm"] is None


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": float("nan")})
    write_json(tmp_path / "a.json", {"b": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
