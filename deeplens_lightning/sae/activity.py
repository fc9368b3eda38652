"""Which latents are alive: silence counted in tokens, over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deeplens_lightning.distributed import max_over_ranks, world_size


class Activity(nn.Module):
    """Counters that a checkpoint carries.

    Attributes:
        silent_tokens: int64 `(d_sae,)`, rows since each latent was last active on any rank.
        tokens_seen: int64 scalar, rows trained on, over all ranks.
    """

    silent_tokens: Tensor
    tokens_seen: Tensor

    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.register_buffer("silent_tokens", torch.zeros(d_sae, dtype=torch.int64))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def advance(self, fired: Tensor, rows: int) -> None:
        """Count a batch of `rows` rows a rank, in which the latents `fired` `(d_sae,)` were active."""
        fired, rows = max_over_ranks(fired), rows * world_size()
        self.silent_tokens.add_(rows).masked_fill_(fired, 0)
        self.tokens_seen.add_(rows)

    def dead_fraction(self, after: int) -> Tensor:
        """Share of latents that were silent for `after` rows or more, a scalar."""
        return (self.silent_tokens >= after).float().mean()

    @torch.no_grad()
    def candidates(self, after: int, limit: int) -> tuple[Tensor, Tensor] | None:
        """At most `limit` latents for AuxK, the longest silent first, and which of them are dead.

        The CPU looks how many are dead, and gives None when none is. Elsewhere looking would wait for
        the device, so the number of candidates is fixed and the living among them are told apart.
        """
        silent, limit = self.silent_tokens, min(limit, len(self.silent_tokens))
        if silent.device.type != "cpu":
            values, latents = silent.topk(limit)
            return latents, values >= after
        dead = (silent >= after).nonzero().squeeze(1)
        if len(dead) > limit:
            dead = dead[silent[dead].topk(limit).indices]
        return (dead, torch.ones_like(dead, dtype=torch.bool)) if len(dead) else None
