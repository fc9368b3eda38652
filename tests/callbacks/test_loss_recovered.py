"""CE recovered is exactly 1 and 0 for known SAEs, and measuring it does not change the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from deeplens_lightning.callbacks import LossRecovered
from deeplens_lightning.callbacks.segments import from_blocks
from deeplens_lightning.text.packing import Blocks


class _Fixed(L.LightningModule):
    """An SAE that does not train: its reconstruction is its input times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z * self.factor

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return 0.0 * self.factor

    def validation_step(self, batch: torch.Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _values(run: Any) -> dict[str, float]:
    return {
        k: float(v) for k, v in run.trainer.callback_metrics.items() if k.startswith(("val/ce", "val/kl"))
    }


def test_identity_recovers_exactly_1_and_zero_exactly_0(fit: Callable[..., Any]) -> None:
    identity = _values(fit([LossRecovered(200)], sae=_Fixed(1.0)))
    zero = _values(fit([LossRecovered(200)], sae=_Fixed(0.0)))
    assert identity["val/ce_recovered"] == 1.0
    assert identity["val/kl"] == 0.0
    assert identity["val/ce_sae"] == identity["val/ce_clean"]
    assert zero["val/ce_recovered"] == 0.0
    assert zero["val/ce_sae"] == zero["val/ce_zero"] != zero["val/ce_clean"]
    assert zero["val/kl"] > 0
    assert zero["val/ce_clean"] == identity["val/ce_clean"]


class _Recording(_Fixed):
    """Keeps the rows that it reconstructs."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.rows: list[torch.Tensor] = []

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.clone())
        return x


class _Constant(_Fixed):
    """Its reconstruction is the same for all rows."""

    def __init__(self, row: torch.Tensor) -> None:
        super().__init__(1.0)
        self.row = row

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.row.expand_as(z)


def test_the_mean_ablation_takes_the_mean_of_all_batches(fit: Callable[..., Any]) -> None:
    recording = _Recording()
    fit([LossRecovered(200, batch_size=1)], sae=recording, max_epochs=1)
    assert len(recording.rows) > 2
    mean = torch.cat(recording.rows).double().mean(0).float()
    found = _values(fit([LossRecovered(200, batch_size=1)], sae=_Constant(mean), max_epochs=1))
    assert found["val/ce_mean"] == pytest.approx(found["val/ce_sae"], rel=1e-5)
    assert abs(found["val/ce_mean"] - found["val/ce_clean"]) > 1e-3


def test_the_clean_loss_is_what_the_untouched_model_gives_segment_by_segment(
    fit: Callable[..., Any], lm_folder: str
) -> None:
    run = fit([LossRecovered(200, batch_size=3)], sae=_Fixed(0.5))
    model = AutoModelForCausalLM.from_pretrained(lm_folder).eval()
    run.datamodule.setup("fit")
    total, count, kept = 0.0, 0, 0
    for block in (chunk for chunk in run.datamodule.heldout_blocks(200) for chunk in _one_by_one(chunk)):
        for start, end in _segments(block):
            if kept >= 200:
                break
            ids, keep = block.tokens[0][start:end], block.keep[0][start:end]
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
            total, count = total + float(losses[keep[:-1]].sum()), count + int(keep[:-1].sum())
            kept += int(keep.sum())
    assert _values(run)["val/ce_clean"] == pytest.approx(total / count, rel=1e-5)


def _one_by_one(chunk: Blocks) -> list[Blocks]:
    return [chunk.select(torch.tensor([i])) for i in range(len(chunk))]


def _segments(block: Blocks) -> list[tuple[int, int]]:
    starts = (block.positions[0] == 0).nonzero()[:, 0].tolist()
    return list(pairwise([*starts, int((block.positions[0] >= 0).sum())]))


def test_files_loggers_and_metrics_agree(fit: Callable[..., Any], tmp_path: Path) -> None:
    run = fit([LossRecovered(150)], max_epochs=2)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "loss_recovered.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [12, 24]
    assert lines[-1]["ce_recovered"] == pytest.approx(_values(run)["val/ce_recovered"], rel=1e-6)
    assert lines[-1]["tokens"] > 100


def test_a_fit_without_validation_measures_at_the_end(fit: Callable[..., Any], tmp_path: Path) -> None:
    run = fit([LossRecovered(150)], limit_val_batches=0)
    assert "val/ce_recovered" in _values(run)
    assert len((tmp_path / "run" / "loss_recovered.jsonl").read_text().splitlines()) == 1


def test_batches_and_weights_are_bit_identical_with_and_without_it(
    fit: Callable[..., Any], undisturbed: Callable[..., None]
) -> None:
    undisturbed(fit([]), fit([LossRecovered(150)]))


def test_the_whole_model_is_loaded_once_and_freed_at_the_end(
    fit: Callable[..., Any], monkeypatch: Any
) -> None:
    loaded = []
    load = AutoModelForCausalLM.from_pretrained

    def counting(*args: Any, **kwargs: Any) -> Any:
        loaded.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    callback = LossRecovered(150)
    assert loaded == []
    fit([callback])
    assert len(loaded) == 1
    assert callback._model is None


def test_a_model_that_was_handed_in_is_used_and_left_as_it_was(
    fit: Callable[..., Any], lm_folder: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(lm_folder).train()
    run = fit([LossRecovered(150, hf_model=model)], sae=_Fixed(1.0))
    assert _values(run)["val/ce_recovered"] == 1.0
    assert model.training
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="has no language model head"):
        fit([LossRecovered(150, hf_model=AutoModel.from_pretrained(lm_folder))])


def test_a_wrapped_or_compiled_model_is_measured_as_the_model_inside(
    fit: Callable[..., Any], lm_folder: str
) -> None:
    def values(hf_model: torch.nn.Module) -> dict[str, float]:
        return _values(fit([LossRecovered(60, hf_model=hf_model)], sae=_Fixed(0.5), max_epochs=1))

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(lm_folder)

    expected = values(model())
    assert values(torch.compile(model(), backend="eager")) == expected
    in_place = model()
    in_place.transformer.h[1].mlp.compile(backend="eager")
    call = in_place.transformer.h[1].mlp._compiled_call_impl
    assert values(in_place) == expected
    assert in_place.transformer.h[1].mlp._compiled_call_impl is call


def test_loss_recovered_without_texts_is_refused_on_shards(
    fit: Callable[..., Any], shards: Callable[[], Any]
) -> None:
    with pytest.raises(ValueError, match=r"needs held-out text.*pass texts"):
        fit([LossRecovered(150)], datamodule=shards())
    run = fit([LossRecovered(texts=["The cat sat on the mat.", "Hello world"])], datamodule=shards())
    assert "val/ce_recovered" in _values(run)


class _WithoutEncode(_Fixed):
    encode = None  # type: ignore[assignment]


def test_a_module_that_is_no_sae_is_refused(fit: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"LossRecovered needs a module with encode\(x\)"):
        fit([LossRecovered(150)], sae=_WithoutEncode(1.0))


def test_blocks_become_segments_and_only_kept_tokens_with_a_successor_are_scored() -> None:
    blocks = Blocks.empty(2, 6)
    blocks.tokens[:] = torch.tensor([[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 11]])
    blocks.positions[:] = torch.tensor([[0, 1, 2, 0, 1, -1], [0, 1, 2, 3, 0, 1]])
    blocks.documents[:] = torch.tensor([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, 2]])
    blocks.keep[:] = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    (batch,) = from_blocks([blocks], 100, whole_rows=False, batch_size=8)
    assert batch.tokens.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9], [10, 11, 0, 0]]
    assert batch.mask.sum(1).tolist() == [3, 2, 4, 2]
    assert batch.scored.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    (rows,) = from_blocks([blocks], 100, whole_rows=True, batch_size=8)
    assert rows.mask.sum(1).tolist() == [5, 6]
    (few,) = from_blocks([blocks], 3, whole_rows=False, batch_size=8)
    assert few.keep.sum() == 4  # the segment that reaches the number is taken whole
    assert rows.scored.int().tolist() == [[0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0]]
