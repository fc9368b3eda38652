"""Activations of single texts are right without a Trainer, and recording them does not change the training."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from deeplens_lightning.callbacks import ExtractSingleSample
from deeplens_lightning.extraction.notebook import ActivationExtractor
from deeplens_lightning.reporting.figures import plot_activation_heatmap

TEXT = "The capital of France is Paris."
# Where an untouched GPT-2 computes each kind: module path, whether its input is read.
PLACES = {
    "mlp_in": ("h.1.mlp", True),
    "mlp_act": ("h.1.mlp.act", False),
    "mlp_post": ("h.1.mlp.c_proj", True),
    "mlp_out": ("h.1.mlp", False),
    "attn_out": ("h.1.attn", False),
    "attn_z": ("h.1.attn.c_proj", True),
    "resid_pre": ("h.1", True),
    "resid_mid": ("h.1.ln_2", True),
    "resid_post": ("h.1", False),
    "final_norm": ("ln_f", False),
}


def _independently(folder: str, text: str, module: str, is_input: bool) -> torch.Tensor:
    """Activations of the untouched model, from a plain PyTorch hook."""
    model = AutoModel.from_pretrained(folder)
    seen: list[torch.Tensor] = []

    def hook(_: Any, inputs: Any, output: Any) -> None:
        value = inputs[0] if is_input else output
        seen.append(value if isinstance(value, torch.Tensor) else value[0])

    model.get_submodule(module).register_forward_hook(hook)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(ids)
    return seen[0][0]


def _relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    norms = b.norm(dim=1)
    return float(((a - b).norm(dim=1) / norms.clamp(min=1e-3 * float(norms.median()))).max())


# ---- without a Trainer


def test_the_tutorials_snippet_gives_one_row_per_token(lm_folder: str) -> None:
    extractor = ExtractSingleSample(hf_model=lm_folder, layer=3, max_length=1024, device="auto")
    activations = extractor.get_mlp_acts(TEXT)
    tokens = extractor.tokenizer.tokenize(TEXT)
    assert activations.shape == (len(tokens), 128)
    assert "".join(extractor.get_tokens(TEXT)) == TEXT
    assert _relative_error(activations, _independently(lm_folder, TEXT, "h.3.mlp.act", False)) < 1e-5


def test_the_defaults_are_gpt2_and_layer_3_as_in_the_tutorial() -> None:
    extractor = ExtractSingleSample()
    assert extractor._own_reader().hf_model == "gpt2"
    assert extractor._named(None, None) == (3, "mlp_act")
    assert extractor.max_length == 1024
    assert extractor.device == "auto"


@pytest.mark.parametrize("kind", PLACES)
def test_every_kind_equals_a_hook_on_the_untouched_model(lm_folder: str, kind: str) -> None:
    extractor = ExtractSingleSample(lm_folder, layer=1, hook=kind)
    assert (
        _relative_error(extractor.get_mlp_acts(TEXT), _independently(lm_folder, TEXT, *PLACES[kind])) < 1e-5
    )


def test_one_extractor_reads_several_places_one_after_the_other(lm_folder: str) -> None:
    extractor = ExtractSingleSample(lm_folder, layer=0)
    for kind in ("mlp_act", "resid_post", "final_norm", "mlp_out"):
        got = extractor.get_mlp_acts(TEXT, layer=1, hook=kind)
        assert _relative_error(got, _independently(lm_folder, TEXT, *PLACES[kind])) < 1e-5
    assert extractor.get_mlp_acts(TEXT).shape[1] == 128


def test_a_loaded_model_is_used_and_left_as_it_was(lm_folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(lm_folder).train()
    extractor = ExtractSingleSample(model, layer=1, tokenizer=lm_folder)
    got = extractor.get_mlp_acts(TEXT)
    assert _relative_error(got, _independently(lm_folder, TEXT, "h.1.mlp.act", False)) < 1e-5
    assert model.training
    assert len(model.transformer.h) == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("make", [ActivationExtractor, ExtractSingleSample])
@pytest.mark.parametrize(("layer_idx", "module"), [(-1, "ln_f"), (0, "h.0"), (3, "h.3"), (-2, "h.2")])
def test_get_activations_returns_the_dictionary_of_the_notebook(
    lm_folder: str, make: Any, layer_idx: int, module: str
) -> None:
    extractor = make(lm_folder, device="cpu")
    result = (
        extractor.get_activations(TEXT, layer_idx) if layer_idx != -1 else extractor.get_activations(TEXT)
    )
    ids = AutoTokenizer.from_pretrained(lm_folder)(TEXT)["input_ids"]
    assert set(result) == {"activations", "tokens", "input_ids", "attention_mask", "layer_idx"}
    assert result["activations"].shape == (1, len(ids), 32)
    assert result["tokens"] == extractor.tokenizer.convert_ids_to_tokens(ids)
    assert result["input_ids"].tolist() == [ids]
    assert result["attention_mask"].tolist() == [[1] * len(ids)]
    assert result["layer_idx"] == layer_idx
    assert _relative_error(result["activations"][0], _independently(lm_folder, TEXT, module, False)) < 1e-5


def test_a_list_of_texts_is_padded_masked_and_each_equals_itself_alone(lm_folder: str) -> None:
    extractor = ActivationExtractor(lm_folder)
    texts = [TEXT, "Hello", "a longer text, of many more tokens than either of the others has"]
    result = extractor.get_activations(texts, 2)
    lengths = result["attention_mask"].sum(1).tolist()
    assert len(result["tokens"]) == 3
    for i, text in enumerate(texts):
        alone = extractor.get_activations(text, 2)
        assert lengths[i] == alone["activations"].shape[1]
        assert result["tokens"][i][: lengths[i]] == alone["tokens"]
        assert _relative_error(result["activations"][i, : lengths[i]], alone["activations"][0]) < 1e-5


def test_the_notebooks_cells_run(lm_folder: str, tmp_path: Path) -> None:
    extractor = ActivationExtractor(model_name=lm_folder, device="cpu")
    result = extractor.get_activations("The cat sat on the mat.")
    figure = plot_activation_heatmap(
        result["activations"][0], result["tokens"], "GPT-2 Activations: 'The cat sat on the mat.'"
    )
    assert figure.axes[0].get_title() == "GPT-2 Activations: 'The cat sat on the mat.'"


@pytest.mark.parametrize("text", ["", "   \n"])
def test_an_empty_text_is_refused(lm_folder: str, text: str) -> None:
    with pytest.raises(ValueError, match="is empty: there is no token"):
        ExtractSingleSample(lm_folder).get_mlp_acts(text)
    with pytest.raises(ValueError, match="empty list"):
        ExtractSingleSample(lm_folder).get_activations([])


def test_a_long_text_is_cut_with_one_warning(lm_folder: str) -> None:
    extractor = ExtractSingleSample(lm_folder, layer=1, max_length=5)
    with pytest.warns(UserWarning, match=r"cut to 5 \(max_length\)") as caught:
        assert len(extractor.get_mlp_acts(TEXT)) == 5
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(extractor.get_mlp_acts(TEXT)) == 5


def test_a_text_beyond_the_models_positions_is_cut_there(lm_folder: str) -> None:
    with pytest.warns(UserWarning, match=r"cut to 64 \(the model's positions\)"):
        assert len(ExtractSingleSample(lm_folder).get_mlp_acts(TEXT * 50)) == 64


def test_another_models_tokenizer_is_refused(lm_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(lm_folder)
    tokenizer.add_tokens(["France"])
    with pytest.raises(
        ValueError, match=r"token id 600 \('France'\) is outside the model's vocabulary of 600"
    ):
        ExtractSingleSample(lm_folder, tokenizer=tokenizer).get_mlp_acts(TEXT)


def test_wrong_layers_hooks_and_settings_are_refused_by_name(lm_folder: str) -> None:
    with pytest.raises(ValueError, match=r"layers 0 to 3|0\.\.3|0 to 3"):
        ExtractSingleSample(lm_folder, layer=12).get_mlp_acts(TEXT)
    with pytest.raises(ValueError, match="mlp_act"):
        ExtractSingleSample(lm_folder, hook="mlp_akt").get_mlp_acts(TEXT)
    with pytest.raises(ValueError, match="max_length=0"):
        ExtractSingleSample(lm_folder, max_length=0)
    with pytest.raises(TypeError, match="texts must be a list"):
        ExtractSingleSample(lm_folder, texts=TEXT)


# ---- as a callback


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (folder / "single_samples" / "samples.jsonl").read_text().splitlines()
    ]


def test_files_hold_every_token_of_every_recorded_step(
    fit: Callable[..., Any], tmp_path: Path, lm_folder: str
) -> None:
    callback = ExtractSingleSample(texts=[TEXT, "Hello world"], every_n_steps=10)
    run = fit([callback])
    lines = _lines(tmp_path / "run")
    assert sorted({line["step"] for line in lines}) == [10, 12, 20, 24]  # 12, 24: validation and the end
    last = [line for line in lines if line["step"] == 24 and line["sample"] == 0]
    assert "".join(line["token"] for line in last) == TEXT
    x = _independently(lm_folder, TEXT, "h.1.mlp.act", False)
    run.sae.eval()
    with torch.no_grad():
        z = run.sae.encode(x)
        error = (run.sae(x) - x).norm(dim=1)
    for i, line in enumerate(last):
        assert line["position"] == i
        assert line["norm"] == pytest.approx(float(x[i].norm()), rel=1e-4)
        assert line["error"] == pytest.approx(float(error[i]), rel=1e-3)
        assert line["relative_error"] == pytest.approx(float(error[i] / x[i].norm()), rel=1e-3)
        assert line["l0"] == int((z[i] > 0).sum())
        assert line["values"] == pytest.approx(z[i].topk(len(line["values"])).values.tolist(), rel=1e-3)
        assert line["values"] == pytest.approx(z[i][line["latents"]].tolist(), rel=1e-3)
    pictures = sorted(path.name for path in (tmp_path / "run" / "single_samples").glob("*.png"))
    assert pictures == [f"step_{step:08d}_sample_{i}.png" for step in (12, 24) for i in (0, 1)]


def test_batches_weights_and_random_numbers_are_bit_identical_with_and_without_it(
    fit: Callable[..., Any], undisturbed: Callable[..., None]
) -> None:
    def observed(callbacks: list[L.Callback]) -> tuple[Any, ...]:
        run = fit(callbacks)
        return run, torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002

    plain, *rng = observed([])
    watched, *watched_rng = observed([ExtractSingleSample(texts=[TEXT], every_n_steps=1)])
    undisturbed(plain, watched)
    assert torch.equal(rng[0], watched_rng[0])
    assert rng[1] == watched_rng[1]
    assert (rng[2] == watched_rng[2]).all()


def test_it_reads_through_the_datamodules_own_model(
    fit: Callable[..., Any], live: Callable[..., Any], lm_folder: str, monkeypatch: Any
) -> None:
    from deeplens_lightning.model.frozen import FrozenModel

    loaded = []
    load = FrozenModel.load.__func__  # type: ignore[attr-defined]

    def counting(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(args)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(FrozenModel, "load", classmethod(counting))
    model = AutoModelForCausalLM.from_pretrained(lm_folder)
    fit([ExtractSingleSample(texts=[TEXT], every_n_steps=5)], datamodule=live(hf_model=model))
    assert len(loaded) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tensorboard_holds_scalars_pictures_and_tables(fit: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit([ExtractSingleSample(texts=[TEXT], every_n_steps=10)], logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("single_sample/0/relative_error")] == [10, 12, 20, 24]
    assert [event.step for event in events.Images("single_sample/0/heatmap")] == [12, 24]
    assert events.Images("single_sample/0/heatmap")[0].encoded_image_string.startswith(b"\x89PNG")
    assert "single_sample/0/tokens/text_summary" in events.Tags()["tensors"]
    assert (Path(logger.log_dir) / "single_samples" / "samples.jsonl").exists()


def test_wandb_offline_and_mlflow_run_side_by_side(
    fit: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    wandb_logger = WandbLogger(project="p", offline=True, save_dir=str(tmp_path / "wandb"))
    mlflow_logger = MLFlowLogger("e", tracking_uri=f"file:{tmp_path / 'mlflow'}")
    fit([ExtractSingleSample(texts=[TEXT], every_n_steps=10)], logger=[mlflow_logger, wandb_logger])
    wandb_logger.experiment.finish()
    run = tmp_path / "mlflow" / str(mlflow_logger.name) / str(mlflow_logger.version)
    assert len(list(run.glob("artifacts/images/*.png"))) == 2
    assert (run / "metrics" / "single_sample" / "0" / "relative_error").exists()
    assert (run / "single_samples" / "samples.jsonl").exists()
    assert list((tmp_path / "wandb").rglob("media/images/**/*.png"))
    assert list((tmp_path / "wandb").rglob("media/table/**/*.json"))


def test_without_a_model_the_error_says_what_to_pass_and_load_own_loads_one(
    fit: Callable[..., Any], shards: Callable[[], Any], lm_folder: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"no model to read.*load_own=True"):
        fit([ExtractSingleSample(texts=[TEXT])], datamodule=shards())
    fit([ExtractSingleSample(texts=[TEXT], load_own=True)], datamodule=shards())
    fit([ExtractSingleSample(lm_folder, texts=[TEXT], name="own")], datamodule=shards())
    own = (tmp_path / "run" / "own" / "samples.jsonl").read_text()
    assert [json.loads(line)["token_id"] for line in own.splitlines()]


def test_a_trainer_without_texts_or_with_another_hook_is_refused(fit: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="needs texts"):
        fit([ExtractSingleSample()])
    with pytest.raises(ValueError, match=r"layers\.1\.mlp_act, not layers\.2\.mlp_act|is not among them"):
        fit([ExtractSingleSample(texts=[TEXT], layer=2)])
    with pytest.raises(ValueError, match="is empty"):
        fit([ExtractSingleSample(texts=[" "])])
    with pytest.raises(ValueError, match="every_n_steps=0"):
        ExtractSingleSample(texts=[TEXT], every_n_steps=0)


class _Plain(L.LightningModule):
    """A module of a user that has no encode and no decode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(128, 128)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.layer(batch) - batch).square().mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_module_that_is_no_sae_gets_norms_only(fit: Callable[..., Any], tmp_path: Path) -> None:
    fit([ExtractSingleSample(texts=[TEXT])], sae=_Plain())
    line = _lines(tmp_path / "run")[0]
    assert line["norm"] > 0
    assert "latents" not in line


def test_activations_can_be_read_after_training(fit: Callable[..., Any], lm_folder: str) -> None:
    callback = ExtractSingleSample(texts=[TEXT])
    fit([callback])
    got = callback.get_mlp_acts(TEXT)
    assert _relative_error(got, _independently(lm_folder, TEXT, "h.1.mlp.act", False)) < 1e-5


@pytest.mark.parametrize("normalize", ["none", "zscore"])
def test_latents_of_the_last_record_have_contexts_in_held_out_text(
    normalize: str, fit: Callable[..., Any], live: Callable[..., Any], tmp_path: Path
) -> None:
    dm = live(normalize=normalize)
    run = fit([ExtractSingleSample(texts=[TEXT])], datamodule=dm)
    folder = tmp_path / "run" / "single_samples"
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    named = {latent for line in lines if line["step"] == 24 for latent in line["latents"]}
    found = json.loads((folder / "latents.json").read_text())
    assert (found["step"], found["rows"], found["sae"]) == (24, 128, "")
    assert [entry["latent"] for entry in found["latents"]] == sorted(named)
    dm.setup("fit")
    scaling = dm.scaling
    rows = torch.cat([scaling.undo(batch) for batch in dm.val_dataloader()])
    with torch.no_grad():
        z = run.sae.eval().encode(rows)
    for entry in found["latents"]:
        top = float(z[:, entry["latent"]].max())
        values = [context["value"] for context in entry["contexts"]]
        assert values[:1] == pytest.approx([top] if top > 0 else [], rel=1e-3)


def test_without_held_out_rows_it_says_that_latents_have_no_contexts(
    fit: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        fit([ExtractSingleSample(texts=[TEXT])], limit_val_batches=0, max_epochs=1)
    assert any("ExtractSingleSample has no contexts of its latents" in message for message in caplog.messages)
    assert not (tmp_path / "run" / "single_samples" / "latents.json").exists()
