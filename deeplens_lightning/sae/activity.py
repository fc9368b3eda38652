"""Find dead latents: count, over all ranks, the tokens since each latent was last active."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deeplens_lightning.distributed import max_over_ranks


class Activity(nn.Module):
    """Counters of inactive latents, which are part of the checkpoint.

    Args:
        d_sae: number of latents.

    Attributes:
        silent_tokens: int64 `(d_sae,)`, rows since each latent was last active on any rank.
        tokens_seen: int64 scalar, rows that were trained on, over all ranks.
    """

    silent_tokens: Tensor
    tokens_seen: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.register_buffer("silent_tokens", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def advance(self, fired: Tensor, rows: Tensor | int) -> None:
        """Count a batch.

        Args:
            fired: bool `(d_sae,)`, latents that were active in any row of this rank.
            rows: rows of the batches of all ranks together.
        """
        self.silent_tokens.add_(rows).masked_fill_(max_over_ranks(fired), 0)
        self.tokens_seen.add_(rows)

    def dead_fraction(self, after: int) -> Tensor:
        """Share of latents that were inactive for `after` rows or more, a scalar."""
        return (self.silent_tokens >= after).float().mean()

    @torch.no_grad()
    def candidates(self, after: int, limit: int) -> tuple[Tensor, Tensor] | None:
        """Latents that AuxK may use, those that were inactive longest, and which of them are dead.

        On the CPU all of them are dead. On another device, counting the dead would wait for the device, so the
        number of candidates is fixed and some of them may be alive.

        Args:
            after: number of inactive rows from which a latent is dead.
            limit: largest number of latents.

        Returns:
            int64 `(candidates,)` latents and bool `(candidates,)`, whether each is dead; None on the CPU if no
            latent is dead.
        """
        silent, limit = self.silent_tokens, min(limit, len(self.silent_tokens))
        if silent.device.type != "cpu":
            values, latents = silent.topk(limit)
            return latents, values >= after
        dead = (silent >= after).nonzero().squeeze(1)
        if len(dead) > limit:
            dead = dead[silent[dead].topk(limit).indices]
        return (dead, torch.ones_like(dead, dtype=torch.bool)) if len(dead) else None
