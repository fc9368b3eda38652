"""Documents of a dataset for one rank and one split, in the epoch's order.

In: a `Source`. Out: `RankDocument`s, each with the position from which reading continues with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np

from deeplens_lightning.text.dealing import Dealing, Place
from deeplens_lightning.text.sources import Row, Source
from deeplens_lightning.types import DealingState, TextPosition

Split = Literal["train", "heldout"]


def document_hash(row: Row) -> int:
    """A document's identity: the first 8 bytes of its BLAKE2b digest, as a signed 64-bit integer."""
    data = (
        row.encode("utf-8", "surrogatepass")
        if isinstance(row, str)
        else np.asarray(row, dtype="<i8").tobytes()
    )
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big", signed=True)


def is_heldout(document: int, val_fraction: float) -> bool:
    """Whether the document with this hash belongs to the held-out split: the same on every run and machine."""
    return (document & 0xFFFF_FFFF_FFFF_FFFF) < int(val_fraction * 2**64)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDocument:
    """A document that one rank reads.

    Attributes:
        position: reading from here begins with this document.
        index: its number in the source.
        hash: `document_hash` of it.
        row: the text, or its token ids.
    """

    position: TextPosition
    index: int
    hash: int
    row: Row


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The documents of one split that one rank reads.

    Attributes:
        source: all documents.
        split: `train`, or `heldout`.
        val_fraction: share of documents held out, by the hash of their text.
        seed: what the order is drawn from.
        rank: this one.
        ranks: number of ranks.
    """

    source: Source
    split: Split
    val_fraction: float
    seed: int
    rank: int = 0
    ranks: int = 1

    def read(self, epoch: int, start: TextPosition | None = None) -> Iterator[RankDocument]:
        """This rank's documents of an epoch, from its start or from a position on."""
        part, number = start.at if start else (0, 0)
        dealing = Dealing.from_state(start.dealing) if start else self._dealing(self.ranks)
        first_segment = start.segment if start else 0
        for k in range(part, self.source.parts):
            if dealing.skips(k, self.rank):
                continue
            here, reader = (number, start.reader if start else None) if k == part else (0, None)
            for text in self.source.read(k, here, seed=self.seed, epoch=epoch, reader=reader):
                document = document_hash(text.row)
                if is_heldout(document, self.val_fraction) != (self.split == "heldout"):
                    continue
                before = dealing.state()
                dealt = dealing.deal(text.at, len(text.row))
                if dealt is None or dealt[0] != self.rank:
                    continue
                segment, first_segment = max(dealt[1], first_segment), 0
                position = TextPosition(at=text.at, reader=text.reader, dealing=before, segment=segment)
                yield RankDocument(position=position, index=text.index, hash=document, row=text.row)

    def dealt_again(self, start: TextPosition | None, frontiers: Sequence[Place], ranks: int) -> DealingState:
        """A dealing that gives the present ranks what `ranks` earlier ones had not finished.

        Args:
            start: the first of those documents; None at the very beginning.
            frontiers: the first place not finished of each earlier rank.
            ranks: number of earlier ranks.
        """
        earlier = Dealing.from_state(start.dealing) if start else self._dealing(ranks)
        earlier.frontiers = list(frontiers)
        dealing = self._dealing(self.ranks)
        dealing.earlier = earlier
        return dealing.state()

    def _dealing(self, ranks: int) -> Dealing:
        return Dealing(ranks=ranks, by_shards=self.source.parts > 1 and self.source.parts % ranks == 0)
