"""The SAEs that a fit exports are those that it trained, and other programs load them and measure the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import EMAWeightAveraging
from transformers import AutoModelForCausalLM, PreTrainedModel

from deeplens_lightning.callbacks import ExportSAE, FitSummary
from deeplens_lightning.callbacks.sae_view import require_sae
from deeplens_lightning.callbacks.segments import Segments
from deeplens_lightning.callbacks.spliced_loss import measure
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.splicing import spliced
from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid
from deeplens_lightning.sae.metrics import HeldOutMetrics
from tests.support.training import data, sae, trainer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deeplens_lightning" / "demo" / "lm"


def fit(folder: Path, lm: str, *callbacks: L.Callback, module: Any = None, **options: Any) -> Any:
    dm = data(lm, **options.pop("data_options", {}))
    module = sae(dm) if module is None else module
    run = trainer(folder, None, list(callbacks), **({"max_steps": 3, "limit_val_batches": 1} | options))
    run.fit(module, dm)
    return module


def test_saelens_loads_the_folder_that_the_last_line_names(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    export = ExportSAE()
    with caplog.at_level(logging.INFO):
        module = fit(tmp_path, tiny("gpt2"), FitSummary(), export, data_options={"normalize": "zscore"})
    assert export.written == [tmp_path / "sae"]
    assert f'exported: load it with sae_lens.SAE.load_from_disk("{tmp_path / "sae"}")' in caplog.text
    assert str(tmp_path / "sae") in json.loads((tmp_path / "summary.json").read_text())["written"]
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    x = torch.randn(50, module.d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hooks", ["one", "crosscoder"])
def test_safetensors_hold_every_bit_of_the_sae(hooks: str, tiny: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"normalize": "zscore"}
    options |= {"layer": [0, 1]} if hooks == "crosscoder" else {}
    module = fit(tmp_path, tiny("gpt2"), ExportSAE("safetensors"), data_options=options)
    again = SparseAutoencoder.from_safetensors(tmp_path / "sae")
    assert again.settings == module.settings
    assert again.trained_on == module.trained_on
    state = module.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("layout", ["saelens", "safetensors"])
def test_each_sae_of_a_grid_has_a_folder(layout: Any, tiny: Any, tmp_path: Path) -> None:
    export = ExportSAE(layout, folder=tmp_path / "mine")
    module = SparseAutoencoderGrid(data(tiny("gpt2")).d_in, {"k": [2, 4]}, {"d_sae": 64})
    fit(tmp_path / "run", tiny("gpt2"), export, module=module)
    assert export.written == [tmp_path / "mine" / "k=2", tmp_path / "mine" / "k=4"]
    read = {"saelens": SparseAutoencoder.from_saelens, "safetensors": SparseAutoencoder.from_safetensors}
    assert [read[layout](folder).settings["k"] for folder in export.written] == [2, 4]


def test_averaged_weights_are_those_of_the_final_checkpoint(tiny: Any, tmp_path: Path) -> None:
    callbacks = (ExportSAE("safetensors"), FitSummary(), EMAWeightAveraging(decay=0.9, use_buffers=False))
    fit(tmp_path, tiny("gpt2"), *callbacks, enable_checkpointing=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    saved = torch.load(summary["figures"]["file"], weights_only=True)["state_dict"]
    exported = SparseAutoencoder.from_safetensors(tmp_path / "sae").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in exported.items())


class _Mean(L.LightningModule):
    def __init__(self, d_in: Any) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(d_in))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (batch - self.mean).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


REFUSED: dict[str, tuple[Callable[[Path, Any], Any], str]] = {
    "hub": (lambda *_: ExportSAE("hub"), r"cannot upload .* yet: give format='saelens' and upload"),
    "unknown": (lambda *_: ExportSAE("onnx"), "format='onnx' must be one of 'saelens', 'safetensors', 'hub'"),  # type: ignore[arg-type]
    "crosscoder": (
        lambda folder, lm: fit(folder, lm, ExportSAE(), data_options={"layer": [0, 1]}),
        "SAELens has no crosscoders",
    ),
    "no method": (
        lambda folder, lm: fit(folder, lm, ExportSAE(), module=_Mean(data(lm).d_in)),
        "_Mean has no method export_saelens",
    ),
    "existing folder": (
        lambda folder, lm: fit(folder, lm, ExportSAE(folder=folder.parent)),
        "exists already: give ExportSAE another folder, or overwrite=True",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_before_the_first_step(
    case: str, tiny: Any, tmp_path: Path
) -> None:
    make, message = REFUSED[case]
    (tmp_path / "a file").touch()
    with pytest.raises((ValueError, TypeError, FileExistsError), match=message):
        make(tmp_path / "run", tiny("gpt2"))
    assert not list((tmp_path / "run").rglob("*"))


# ---- the quickstart, against SAELens's own evaluation


def _lens(model: PreTrainedModel) -> Any:
    """The embedded model in TransformerLens, with converted but unprocessed weights."""
    transformer_lens = pytest.importorskip("transformer_lens")
    conversions = pytest.importorskip("transformer_lens.pretrained.weight_conversions")
    c: Any = model.config
    cfg = transformer_lens.HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_heads=c.n_head,
        d_head=c.n_embd // c.n_head,
        d_mlp=4 * c.n_embd,
        n_ctx=c.n_positions,
        d_vocab=c.vocab_size,
        eps=c.layer_norm_epsilon,
        act_fn="gelu_new",
        normalization_type="LN",
        use_attn_scale=True,
        dtype=torch.float32,
        device="cpu",
    )
    hooked = transformer_lens.HookedTransformer(cfg)
    hooked.load_state_dict(conversions.convert_gpt2_weights(model, cfg), strict=False)
    return hooked.eval()


def _heldout_segments(count: int) -> torch.Tensor:
    """Whole segments of held-out text, `(count, seq_length)`; the last token is one that occurs nowhere else."""
    dm = ActivationDataModule("demo:lm", layer=3, hook="mlp_act", seq_length=128, val_fraction=0.05)
    dm.setup()
    blocks = dm.heldout_blocks(10**6)
    assert blocks is not None
    found = [
        tokens for chunk in blocks
        for tokens, positions in zip(chunk.tokens, chunk.positions, strict=True)
        if torch.equal(positions.cpu(), torch.arange(len(positions)))
    ][:count]  # fmt: skip
    dm.teardown()
    tokens = torch.stack(found).long()
    tokens[:, -1] = next(i for i in range(4096) if not (tokens == i).any())
    return tokens


def measured_by_both(folder: Path, checkpoint: str) -> dict[str, tuple[float, float]]:
    """Figures of SAELens on an exported folder, and ours on a checkpoint, on the same held-out blocks."""
    sae_lens = pytest.importorskip("sae_lens")
    evals = pytest.importorskip("sae_lens.evals")
    scaler = pytest.importorskip("sae_lens.training.activation_scaler").ActivationScaler()
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO).eval()  # type: ignore[no-untyped-call]
    tokens = _heldout_segments(48)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, -1] = False

    theirs = sae_lens.SAE.load_from_disk(folder)
    metadata = theirs.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("demo:lm", "layers.3.mlp_act")
    metadata.hook_name, metadata.context_size, metadata.prepend_bos = "blocks.3.mlp.hook_post", 128, False
    hooked = _lens(model)
    store = sae_lens.ActivationsStore.from_sae(
        hooked, theirs, dataset=Dataset.from_dict({"tokens": [*tokens.tolist(), *tokens.tolist()]}),
        streaming=False, store_batch_size_prompts=16, train_batch_size_tokens=128, n_batches_in_buffer=2,
        total_tokens=48,
    )  # fmt: skip
    config = evals.EvalConfig(
        batch_size_prompts=16,
        n_eval_reconstruction_batches=3,
        n_eval_sparsity_variance_batches=3,
        compute_kl=True,
        compute_ce_loss=True,
        compute_variance_metrics=True,
    )
    last = int(tokens[0, -1])
    found, _ = evals.run_evals(theirs, store, hooked, scaler, config, exclude_special_tokens=[last])

    module = SparseAutoencoder.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    metrics = HeldOutMetrics(module.d_sae, module.read.width, torch.device("cpu"))

    def watch(x: torch.Tensor) -> torch.Tensor:
        metrics.update(x[keep], module(x[keep]), module.encode(x[keep]))
        return x

    with torch.no_grad():
        with spliced(model, "layers.3.mlp_act", watch):
            model(tokens, use_cache=False)
        view = require_sae(module, ("layers.3.mlp_act",), "the test", None)
        batch = Segments(tokens=tokens, mask=torch.ones_like(tokens), keep=keep, scored=keep)
        ours = measure(model, view, resolve(model, None, view.hooks), [batch], None, torch.device("cpu"))
    quality, loss = found["reconstruction_quality"], found["model_performance_preservation"]
    return {
        "explained variance": (quality["explained_variance"], 1 - float(metrics.compute()["fvu"])),
        "CE with the SAE": (loss["ce_loss_with_sae"], ours.ce_sae),
        "CE without": (loss["ce_loss_without_sae"], ours.ce_clean),
        "KL": (found["model_behavior_preservation"]["kl_div_with_sae"], ours.kl),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning:sae_lens")
def test_saelens_measures_the_same_figures_on_the_same_blocks(tmp_path: Path) -> None:
    dm = ActivationDataModule("demo:lm", layer=3, hook="mlp_act", batch_size=256, val_rows=512)
    run = trainer(tmp_path, None, [FitSummary(), ExportSAE()], enable_checkpointing=True, max_steps=30)
    run.fit(SparseAutoencoder(dm.d_in, expansion_factor=2, k=32, lr=4e-3), dm)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name, (saelens, here) in measured_by_both(tmp_path / "sae", summary["figures"]["file"]).items():
        assert saelens == pytest.approx(here, rel=1e-3), name
