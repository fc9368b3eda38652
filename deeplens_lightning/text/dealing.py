"""Deal documents to data-parallel ranks: every rank computes the same answer without communication."""

from __future__ import annotations

from dataclasses import dataclass, field

from deeplens_lightning.types import DealingState

Place = tuple[int, int, int]
"""Part of the dataset, number in the part, segment: a point in the epoch's order that holds for all ranks."""


@dataclass(slots=True, kw_only=True)
class Dealing:
    """Decides which rank gets a document.

    Whole parts of the dataset go round where their number divides by the number of ranks; else each document goes
    to the rank with the fewest characters so far. After a change of the number of ranks, the documents that the
    earlier ranks had not finished are dealt again: the earlier dealing decides first, and what lies at or beyond
    the frontier of the rank that it names is dealt to the present ranks.

    Attributes:
        ranks: number of ranks.
        by_shards: whole parts of the dataset go round.
        loads: characters dealt to each rank.
        frontiers: the first place not finished, per rank; empty while documents are dealt to the present ranks.
        earlier: the dealing before the number of ranks changed.
    """

    ranks: int
    by_shards: bool
    loads: list[int] = field(default_factory=list)
    frontiers: list[Place] = field(default_factory=list)
    earlier: Dealing | None = None

    def __post_init__(self) -> None:
        self.loads = self.loads or [0] * self.ranks

    def deal(self, at: tuple[int, int], size: int) -> tuple[int, int] | None:
        """Choose a rank for a document; must be called for every document of the split, in order.

        Args:
            at: part of the dataset and number in the part.
            size: characters of the document.

        Returns:
            The rank and the first segment that it reads; None where the document was finished before.
        """
        segment = 0
        if self.earlier is not None:
            passed = self.earlier.deal(at, size)
            if passed is None:
                return None
            frontier = self.earlier.frontiers[passed[0]]
            if at < frontier[:2]:
                return None
            segment = max(frontier[2], passed[1]) if at == frontier[:2] else passed[1]
        rank = at[0] % self.ranks if self.by_shards else min(range(self.ranks), key=self.loads.__getitem__)
        self.loads[rank] += size
        return rank, segment

    def skips(self, part: int, rank: int) -> bool:
        """Whether this rank gets no document of a part, so that the part need not be read."""
        return self.by_shards and self.earlier is None and part % self.ranks != rank

    def state(self) -> DealingState:
        """A frozen copy."""
        return DealingState(
            ranks=self.ranks,
            by_shards=self.by_shards,
            loads=tuple(self.loads),
            frontiers=tuple(self.frontiers),
            earlier=self.earlier.state() if self.earlier else None,
        )

    @classmethod
    def from_state(cls, state: DealingState) -> Dealing:
        """The inverse of `state`."""
        return cls(
            ranks=state.ranks,
            by_shards=state.by_shards,
            loads=list(state.loads),
            frontiers=list(state.frontiers),
            earlier=cls.from_state(state.earlier) if state.earlier else None,
        )
