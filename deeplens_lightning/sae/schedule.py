"""How long training will be, and the learning rate over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deeplens_lightning.distributed import world_size

OPEN_ENDED_WARMUP = 1000  # steps, when nobody said how long training is


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Adam's settings and the shape of the learning rate.

    Attributes:
        warmup: share of the planned steps over which the learning rate rises from 0.
        decay: share of them, at the end, over which it falls to 0.
        betas: Adam's.
        eps: Adam's (Gao et al. 2024, appendix A.3).
        clip_norm: gradients of one SAE are scaled down to this norm; the trainer's
            `gradient_clip_val` takes precedence; None switches it off.
    """

    warmup: float = 0.05
    decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    clip_norm: float | None = 1.0

    @classmethod
    def of(cls, settings: Optimization | Mapping[str, Any] | None) -> Optimization:
        """From itself, its fields, or nothing."""
        if isinstance(settings, Mapping):
            return cls(**{**settings, "betas": tuple(settings.get("betas", cls.betas))})
        return cls() if settings is None else settings


def default_lr(d_sae: int) -> float:
    """Proportional to 1 / sqrt(d_sae), as Gao et al. 2024 found (arXiv 2406.04093, appendix A.3).

    The constant was chosen on runs of about a million tokens; give `lr` for much longer ones.
    """
    return 1.5e-3 * math.sqrt(2**13 / d_sae)


def planned_steps(trainer: Any) -> int | None:
    """Optimizer steps that this fit will take, None when it is open-ended.

    Asks the trainer's limits and the data module's budget, never `trainer.estimated_stepping_batches`:
    that one builds the loaders, before their state is restored.
    """
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        return int(trainer.max_steps)
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return None
    batches = _batches_per_epoch(trainer)
    return (
        None if batches is None else max(1, batches * trainer.max_epochs // trainer.accumulate_grad_batches)
    )


def lr_factor(planned: int | None, optimization: Optimization) -> Callable[[int], float]:
    """Step -> multiple of the peak learning rate: linear warm-up, constant, linear decay to 0."""
    if planned is None:
        return lambda step: min(1.0, (step + 1) / OPEN_ENDED_WARMUP)
    warmup, decay = max(1, round(planned * optimization.warmup)), max(1, round(planned * optimization.decay))
    return lambda step: max(0.0, min((step + 1) / warmup, (planned - step) / decay, 1.0))


def _batches_per_epoch(trainer: Any) -> int | None:
    data = trainer.datamodule
    budget, batch_size = getattr(data, "max_tokens", None), getattr(data, "batch_size", None)
    limits = [trainer.limit_train_batches] if isinstance(trainer.limit_train_batches, int) else []
    if budget is not None and batch_size is not None:
        limits.append(budget // (batch_size * world_size()))
    return min(limits) if limits else None
