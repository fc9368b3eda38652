"""Next-token loss of a model whose activations are reconstructed, or ablated, at some hook points.

In: a whole model, an SAE, held-out segments. Out: cross-entropies, KL, and the share recovered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from deeplens_lightning.callbacks.sae_view import SaeView
from deeplens_lightning.callbacks.segments import Segments
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.splicing import spliced

Splice = Callable[[Tensor], Tensor]


def measure(
    model: PreTrainedModel,
    sae: SaeView,
    points: Sequence[HookPoint],
    batches: Sequence[Segments],
    ablated: Mapping[str, float],
    device: torch.device,
) -> dict[str, float]:
    """Next-token losses in nats per scored token, and what follows from them.

    Args:
        model: with its head, in evaluation mode.
        sae: what reconstructs.
        points: the hook points `sae.hooks` of this model.
        batches: held-out segments.
        ablated: `ce_zero` and `ce_mean` where known: they do not depend on the SAE.
        device: where the SAE is.

    Returns:
        `ce_clean, ce_sae, ce_zero, ce_mean, kl, ce_recovered, ce_recovered_mean` (against mean ablation)
        and `tokens`, how many were scored.
    """
    writes = [point for point in points if point.name in sae.writes]
    sums: dict[str, float] = dict.fromkeys(("clean", "sae", "zero", "mean", "kl", "tokens"), 0.0)
    means = {} if ablated else _means(model, writes, batches)
    for batch in batches:
        rows: dict[str, Tensor] = {}
        clean = _predict(model, batch, {point: _recorder(rows, point.name, batch) for point in points})
        given = sae.reconstruct({name: x.to(device) for name, x in rows.items()})
        spliced_in = _predict(model, batch, {p: _writer(given[p.name], batch) for p in writes})
        sums["clean"] += _loss(clean, batch)
        sums["sae"] += _loss(spliced_in, batch)
        sums["kl"] += float(kl_div(spliced_in, clean, log_target=True, reduction="sum"))
        sums["tokens"] += int(batch.scored.sum())
        if not ablated:
            zeros = {p: _writer(torch.zeros_like(rows[p.name]), batch) for p in writes}
            flat = {p: _writer(means[p.name].expand_as(rows[p.name]), batch) for p in writes}
            sums["zero"] += _loss(_predict(model, batch, zeros), batch)
            sums["mean"] += _loss(_predict(model, batch, flat), batch)
    tokens = sums["tokens"]
    ce = {name: sums[name] / tokens for name in ("clean", "sae")}
    ce |= {name: ablated.get(f"ce_{name}", sums[name] / tokens) for name in ("zero", "mean")}
    return {
        **{f"ce_{name}": value for name, value in ce.items()},
        "kl": sums["kl"] / tokens,
        "ce_recovered": _recovered(ce["clean"], ce["sae"], ce["zero"]),
        "ce_recovered_mean": _recovered(ce["clean"], ce["sae"], ce["mean"]),
        "tokens": tokens,
    }


def _predict(model: PreTrainedModel, batch: Segments, splices: Mapping[HookPoint, Splice]) -> Tensor:
    """Log-probabilities of the next token at scored positions, float32 `(n_scored, vocabulary)`."""
    with ExitStack() as stack:
        for point, fn in splices.items():
            stack.enter_context(spliced(model, point, fn))
        device = model.device
        logits = model(
            input_ids=batch.tokens.to(device), attention_mask=batch.mask.to(device), use_cache=False
        ).logits
        return log_softmax(logits[batch.scored.to(device)].float(), dim=-1)


def _loss(predictions: Tensor, batch: Segments) -> float:
    """Summed cross-entropy in nats of `_predict`'s log-probabilities."""
    following = batch.tokens.roll(-1, dims=1)[batch.scored].to(predictions.device)
    return -float(predictions.gather(1, following[:, None]).double().sum())


def _recorder(rows: dict[str, Tensor], name: str, batch: Segments) -> Splice:
    """Changes nothing, and leaves the kept rows `(n_kept, d_in)` under `name`."""

    def record(x: Tensor) -> Tensor:
        rows[name] = x.reshape(*batch.keep.shape, -1)[batch.keep.to(x.device)].clone()
        return x

    return record


def _writer(new: Tensor, batch: Segments) -> Splice:
    """Puts rows `(n_kept, d_in)` at the kept positions."""

    def write(x: Tensor) -> Tensor:
        out = x.clone().reshape(*batch.keep.shape, -1)
        out[batch.keep.to(x.device)] = new.to(x.device, x.dtype)
        return out.reshape(x.shape)

    return write


def _means(
    model: PreTrainedModel, points: Sequence[HookPoint], batches: Sequence[Segments]
) -> dict[str, Tensor]:
    """The mean kept row `(d_in,)` of each hook point."""
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        rows: dict[str, Tensor] = {}
        _predict(model, batch, {point: _recorder(rows, point.name, batch) for point in points})
        count += int(batch.keep.sum())
        for name, x in rows.items():
            sums[name] = sums.get(name, 0) + x.double().sum(0) if x.device.type != "mps" else x.sum(0)
    return {name: (total / count).float() for name, total in sums.items()}


def _recovered(clean: float, reconstructed: float, ablated: float) -> float:
    """1 where nothing is lost, 0 where as much as by ablation; not a number where ablation costs nothing."""
    return (ablated - reconstructed) / (ablated - clean) if ablated != clean else float("nan")
