"""Next-token loss of a language model whose activations are replaced by reconstructions, zeros or means.

In: a whole model, an SAE and held-out segments. Out: cross-entropies, a KL divergence and the share of loss recovered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from deeplens_lightning.callbacks.sae_view import SaeView
from deeplens_lightning.callbacks.segments import Segments
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.splicing import spliced

Splice = Callable[[Tensor], Tensor]
"""Activations `(..., d_in)` at a hook point to what the rest of the model gets in their place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AblatedLoss:
    """Cross-entropies with ablated activations, in nats per scored token; they do not depend on the SAE.

    Attributes:
        ce_zero: with zeros in place of the activations.
        ce_mean: with the mean activation in place of each.
        kl_zero: KL divergence from the clean prediction to the one with zeros.
    """

    ce_zero: float
    ce_mean: float
    kl_zero: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SplicedLoss:
    """Losses on the same held-out tokens, in nats per scored token.

    Attributes:
        ce_clean: cross-entropy of the untouched model.
        ce_sae: cross-entropy with the SAE's reconstruction.
        ce_zero: cross-entropy with zeros.
        ce_mean: cross-entropy with the mean activation.
        kl: KL divergence from the clean prediction to the one with the reconstruction.
        kl_zero: KL divergence from the clean prediction to the one with zeros.
        ce_recovered: `(ce_zero - ce_sae) / (ce_zero - ce_clean)`, the "loss recovered" of Bricken et al. 2023; NaN
            where the denominator is 0.
        ce_recovered_mean: the same with `ce_mean` in place of `ce_zero`.
        tokens: number of scored tokens.
    """

    ce_clean: float
    ce_sae: float
    ce_zero: float
    ce_mean: float
    kl: float
    kl_zero: float
    ce_recovered: float
    ce_recovered_mean: float
    tokens: float


def measure(
    model: PreTrainedModel,
    sae: SaeView,
    points: Sequence[HookPoint],
    batches: Sequence[Segments],
    ablated: AblatedLoss | None,
    device: torch.device,
) -> SplicedLoss:
    """Measure the next-token losses of a model with and without the SAE's reconstruction.

    Args:
        model: the whole model with its head, in evaluation mode.
        sae: the SAE.
        points: the hook points `sae.hooks` of this model.
        batches: held-out segments, with at least one scored position.
        ablated: losses under ablation from an earlier call with the same batches; None measures them.
        device: device of the SAE.
    """
    writes = [point for point in points if point.name in sae.writes]
    sums: dict[str, float] = dict.fromkeys(("clean", "sae", "zero", "mean", "kl", "kl_zero", "tokens"), 0.0)
    means = {} if ablated is not None else _means(model, writes, batches)
    for batch in batches:
        rows: dict[str, Tensor] = {}
        clean = _predict(model, batch, {point: _recorder(rows, point.name, batch) for point in points})
        given = sae.reconstruct({name: x.to(device) for name, x in rows.items()})
        spliced_in = _predict(model, batch, {p: _writer(given[p.name], batch) for p in writes})
        sums["clean"] += _loss(clean, batch)
        sums["sae"] += _loss(spliced_in, batch)
        sums["kl"] += _divergence(clean, spliced_in)
        sums["tokens"] += int(batch.scored.sum())
        if ablated is None:
            zeros = {p: _writer(torch.zeros_like(rows[p.name]), batch) for p in writes}
            flat = {p: _writer(means[p.name].expand_as(rows[p.name]), batch) for p in writes}
            ablated_to_zero = _predict(model, batch, zeros)
            sums["zero"] += _loss(ablated_to_zero, batch)
            sums["kl_zero"] += _divergence(clean, ablated_to_zero)
            sums["mean"] += _loss(_predict(model, batch, flat), batch)
    tokens = sums["tokens"]
    clean_ce, sae_ce = sums["clean"] / tokens, sums["sae"] / tokens
    ablated = ablated or AblatedLoss(
        ce_zero=sums["zero"] / tokens, ce_mean=sums["mean"] / tokens, kl_zero=sums["kl_zero"] / tokens
    )
    return SplicedLoss(
        ce_clean=clean_ce,
        ce_sae=sae_ce,
        ce_zero=ablated.ce_zero,
        ce_mean=ablated.ce_mean,
        kl=sums["kl"] / tokens,
        kl_zero=ablated.kl_zero,
        ce_recovered=_recovered(clean_ce, sae_ce, ablated.ce_zero),
        ce_recovered_mean=_recovered(clean_ce, sae_ce, ablated.ce_mean),
        tokens=tokens,
    )


def _predict(model: PreTrainedModel, batch: Segments, splices: Mapping[HookPoint, Splice]) -> Tensor:
    """Log-probabilities of the next token at scored positions, float32 `(n_scored, vocabulary)`."""
    with ExitStack() as stack:
        for point, fn in splices.items():
            stack.enter_context(spliced(model, point, fn))
        device = model.device
        logits = model(
            input_ids=batch.tokens.to(device), attention_mask=batch.mask.to(device), use_cache=False
        ).logits
        return log_softmax(logits[batch.scored.to(logits.device)].float(), dim=-1)


def _loss(predictions: Tensor, batch: Segments) -> float:
    """Sum of the cross-entropies, in nats, of log-probabilities from `_predict`."""
    following = batch.tokens.roll(-1, dims=1)[batch.scored].to(predictions.device)
    return -math.fsum(predictions.gather(1, following[:, None])[:, 0].tolist())


def _divergence(clean: Tensor, other: Tensor) -> float:
    """Sum of the KL divergences, in nats, from clean predictions to others; log-probabilities from `_predict`."""
    return float(kl_div(other, clean, log_target=True, reduction="sum"))


def _recorder(rows: dict[str, Tensor], name: str, batch: Segments) -> Splice:
    """A splice that changes nothing and stores the kept rows `(n_kept, d_in)` as `rows[name]`."""

    def record(x: Tensor) -> Tensor:
        rows[name] = x.reshape(*batch.keep.shape, -1)[batch.keep.to(x.device)].clone()
        return x

    return record


def _writer(new: Tensor, batch: Segments) -> Splice:
    """A splice that writes the rows `new` `(n_kept, d_in)` at the kept positions."""

    def write(x: Tensor) -> Tensor:
        out = x.clone().reshape(*batch.keep.shape, -1)
        out[batch.keep.to(x.device)] = new.to(x.device, x.dtype)
        return out.reshape(x.shape)

    return write


def _means(
    model: PreTrainedModel, points: Sequence[HookPoint], batches: Sequence[Segments]
) -> dict[str, Tensor]:
    """Mean of the kept rows, float32 `(d_in,)` on the CPU by hook point."""
    sums: dict[str, NDArray[Any]] = {}
    count = 0
    for batch in batches:
        rows: dict[str, Tensor] = {}
        _predict(model, batch, {point: _recorder(rows, point.name, batch) for point in points})
        count += int(batch.keep.sum())
        for name, x in rows.items():
            # On the host, because MPS has no float64.
            sums[name] = sums.get(name, 0) + x.float().cpu().numpy().sum(0, dtype=np.float64)
    return {name: torch.from_numpy((total / count).astype(np.float32)) for name, total in sums.items()}


def _recovered(clean: float, reconstructed: float, ablated: float) -> float:
    """Share of the loss that ablation costs which the reconstruction saves: 1 is all; NaN where ablation costs 0."""
    return (ablated - reconstructed) / (ablated - clean) if ablated != clean else float("nan")
