"""Assign documents to data-parallel ranks; every rank computes the same assignment without communication."""

from __future__ import annotations

from dataclasses import dataclass, field

from deeplens_lightning.types import DealingState

Place = tuple[int, int, int]
"""Part of the dataset, number of the document in the part, number of the segment: a point in the epoch's order."""


@dataclass(slots=True, kw_only=True)
class Dealing:
    """Assign the documents of an epoch to ranks, one after another.

    If the number of parts of the dataset is a multiple of the number of ranks, part `n` goes to rank `n % ranks` as a
    whole. Otherwise each document goes to the rank with the fewest characters so far.

    After a change of the number of ranks, `earlier` is the assignment before the change. A document that `earlier`
    assigned to a rank which had already finished it is skipped. All other documents are assigned to the present ranks.

    Attributes:
        ranks: number of ranks.
        by_shards: whether whole parts of the dataset are assigned.
        loads: number of characters assigned to each rank.
        frontiers: for each rank, the first place that it had not finished when the number of ranks changed; empty if
            this assignment has the present number of ranks.
        earlier: the assignment before the number of ranks changed.
    """

    ranks: int
    by_shards: bool
    loads: list[int] = field(default_factory=list)
    frontiers: list[Place] = field(default_factory=list)
    earlier: Dealing | None = None

    def __post_init__(self) -> None:
        self.loads = self.loads or [0] * self.ranks

    def deal(self, at: tuple[int, int], size: int) -> tuple[int, int] | None:
        """Choose a rank for a document. Must be called for every document of the split, in order.

        Args:
            at: part of the dataset, and number of the document in the part.
            size: length of the document, in characters of text or in token ids.

        Returns:
            The rank and the first segment that it reads; None if the document was finished before the number of ranks
            changed.
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
        """Whether a rank gets no document of a part of the dataset, so that it need not read the part."""
        return self.by_shards and self.earlier is None and part % self.ranks != rank

    def state(self) -> DealingState:
        """A frozen copy, for a position in the text."""
        return DealingState(
            ranks=self.ranks,
            by_shards=self.by_shards,
            loads=tuple(self.loads),
            frontiers=tuple(self.frontiers),
            earlier=self.earlier.state() if self.earlier else None,
        )

    @classmethod
    def from_state(cls, state: DealingState) -> Dealing:
        """Restore from a `DealingState`: the inverse of `state`."""
        return cls(
            ranks=state.ranks,
            by_shards=state.by_shards,
            loads=list(state.loads),
            frontiers=list(state.frontiers),
            earlier=cls.from_state(state.earlier) if state.earlier else None,
        )
