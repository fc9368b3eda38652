"""Settings of Adam and of gradient clipping, and the learning rate over the steps of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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

    def clip(
        self, parameters: Iterable[nn.Parameter], limit: float | None = None, algorithm: str | None = None
    ) -> None:
        """Clip the gradients of one SAE.

        Args:
            parameters: all parameters of the SAE.
            limit: the Trainer's `gradient_clip_val`; None for `clip_norm`, 0 for no clipping.
            algorithm: the Trainer's `gradient_clip_algorithm`: "value" to limit the absolute value of every entry;
                "norm" or None to limit the norm of all gradients together.

        Raises:
            ValueError: the algorithm is "value", and there is no limit for it.
        """
        if limit is None and algorithm == "value":
            raise ValueError(
                "gradient_clip_algorithm='value' needs gradient_clip_val: without it, gradients are clipped to a norm "
                f"of clip_norm={self.clip_norm}, so give the Trainer both or neither"
            )
        limit = self.clip_norm if limit is None else limit
        if limit is not None and limit > 0:
            clip = nn.utils.clip_grad_value_ if algorithm == "value" else nn.utils.clip_grad_norm_
            clip(parameters, limit)


def default_lr(d_sae: int) -> float:
    """Default peak learning rate, proportional to 1 / sqrt(d_sae) (Gao et al. 2024, arXiv 2406.04093, A.3).

    The factor was chosen on runs of about a million tokens; set `lr` for much longer ones.
    """
    return 1.5e-3 * math.sqrt(2**13 / d_sae)


def check_eps(eps: float, dtype: torch.dtype) -> None:
    """Check that Adam's epsilon is not rounded to 0 in the dtype of the weights: Adam would divide 0 by 0.

    Raises:
        ValueError: it is.
    """
    if eps > 0 and not torch.tensor(eps, dtype=dtype):
        raise ValueError(
            f"eps={eps} is 0 in {str(dtype).removeprefix('torch.')}, so Adam would make weights NaN: train with "
            "precision='16-mixed' or 'bf16-true', or give a larger eps, such as Optimization(eps=1e-4)"
        )


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


class WarmupDecay(LambdaLR):
    """The learning rate of `lr_factor` for each parameter group; its length is set when training starts.

    Args:
        optimizer: the optimizer.
        optimizations: the settings of each parameter group.
    """

    def __init__(self, optimizer: Optimizer, optimizations: Sequence[Optimization]) -> None:
        super().__init__(optimizer, [lr_factor(None, each) for each in optimizations])

    def plan(self, steps: int | None, optimizations: Sequence[Optimization]) -> None:
        """Set the number of optimizer steps and the learning rates of the next step; None if it is not known.

        A learning rate that was restored from a checkpoint belongs to the length of that run.
        """
        self.lr_lambdas = [lr_factor(steps, each) for each in optimizations]  # not saved: functions
        for group, peak, factor in zip(
            self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True
        ):
            group["lr"] = peak * factor(self.last_epoch)
