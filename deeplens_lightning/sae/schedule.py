"""Settings of Adam, and the learning rate over the steps of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OPEN_ENDED_WARMUP = 1000  # steps, if the length of training is unknown


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Settings of Adam and of the learning rate schedule.

    Attributes:
        warmup: share of the planned steps over which the learning rate rises from 0.
        decay: share of the planned steps, at the end, over which it falls to 0.
        betas: Adam's betas.
        eps: Adam's epsilon (default of Gao et al. 2024, appendix A.3).
        clip_norm: largest norm of the gradients of one SAE, to which they are scaled down; None switches
            clipping off; the Trainer's `gradient_clip_val` takes precedence.
    """

    warmup: float = 0.05
    decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    clip_norm: float | None = 1.0

    @classmethod
    def of(cls, settings: Optimization | Mapping[str, Any] | None) -> Optimization:
        """An `Optimization` from one, from a dict of its fields, or from None (the defaults)."""
        if isinstance(settings, Mapping):
            return cls(**{**settings, "betas": tuple(settings.get("betas", cls.betas))})
        return cls() if settings is None else settings


def default_lr(d_sae: int) -> float:
    """Default peak learning rate, proportional to 1 / sqrt(d_sae) (Gao et al. 2024, arXiv 2406.04093, A.3).

    The factor was chosen on runs of about a million tokens; set `lr` for much longer ones.
    """
    return 1.5e-3 * math.sqrt(2**13 / d_sae)


def lr_factor(planned: int | None, optimization: Optimization) -> Callable[[int], float]:
    """A function from the step to a factor of the peak learning rate: linear warm-up, constant, linear decay to 0.

    Args:
        planned: number of optimizer steps; None means a warm-up of 1000 steps and no decay.
        optimization: `warmup` and `decay`.
    """
    if planned is None:
        return lambda step: min(1.0, (step + 1) / OPEN_ENDED_WARMUP)
    warmup, decay = max(1, round(planned * optimization.warmup)), max(1, round(planned * optimization.decay))
    return lambda step: max(0.0, min((step + 1) / warmup, (planned - step) / decay, 1.0))
