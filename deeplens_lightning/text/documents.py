"""Read the documents of one split for one rank, in the epoch's order.

In: a `Source`. Out: `RankDocument`s, each with its position in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import numpy as np

from deeplens_lightning.text.dealing import Dealing, Place
from deeplens_lightning.text.sources import IndexedSource, Row, Source
from deeplens_lightning.types import DealingState, TextPosition

Split = Literal["train", "heldout", "test"]


def document_hash(row: Row) -> int:
    """Hash a document: the first 8 bytes of its BLAKE2b digest, as a signed 64-bit integer."""
    data = (
        row.encode("utf-8", "surrogatepass")
        if isinstance(row, str)
        else np.asarray(row, dtype="<i8").tobytes()
    )
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big", signed=True)


def is_heldout(document: int, val_fraction: float) -> bool:
    """Whether a document belongs to the held-out split; depends on nothing but its hash and `val_fraction`.

    Args:
        document: the `document_hash` of the document.
        val_fraction: share of documents held out, 0 to below 1.
    """
    return (document & 0xFFFF_FFFF_FFFF_FFFF) < int(val_fraction * 2**64)


def split_of(document: int, val_fraction: float, test_fraction: float) -> Split:
    """The split of a document: the lowest hashes are held out for validation, the highest ones for the test.

    So the test documents are the same for every `val_fraction`. `shards.rowset` has the same rule.

    Args:
        document: the `document_hash` of the document.
        val_fraction: share of documents held out for validation.
        test_fraction: share of documents held out for the test; together with `val_fraction` below 1.
    """
    if is_heldout(document, val_fraction):
        return "heldout"
    in_test = is_heldout(~document, test_fraction)  # ~ is 2**64 - 1 - document, as unsigned integer
    return "test" if in_test else "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDocument:
    """A document that one rank reads.

    Attributes:
        position: position of the document; reading from there begins with this document.
        index: index of the document in the source.
        hash: `document_hash` of the document.
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
        source: the dataset with all documents.
        split: `train`, `heldout` (for validation) or `test`.
        val_fraction: share of documents held out for validation, by the hash of their text.
        test_fraction: share of documents held out for the test, by the hash of their text.
        seed: seed of the order of documents.
        rank: number of this rank.
        ranks: number of ranks.
    """

    source: Source
    split: Split
    val_fraction: float
    seed: int
    test_fraction: float = 0.0
    rank: int = 0
    ranks: int = 1

    def read(self, epoch: int, start: TextPosition | None = None) -> Iterator[RankDocument]:
        """Iterate over this rank's documents of an epoch, from `start` to the end of the epoch.

        Args:
            epoch: number of the epoch, which selects the order together with the seed.
            start: position of the first document; None for the start of the epoch.
        """
        part, number = start.at if start else (0, 0)
        dealing = Dealing.from_state(start.dealing) if start else self._dealing(self.ranks)
        first_segment = start.segment if start else 0
        for k in range(part, self.source.parts):
            if dealing.skips(k, self.rank):
                continue
            here, reader = (number, start.reader if start else None) if k == part else (0, None)
            for text in self.source.read(k, here, seed=self.seed, epoch=epoch, reader=reader):
                document = document_hash(text.row)
                if split_of(document, self.val_fraction, self.test_fraction) != self.split:
                    continue
                before = dealing.state()
                dealt = dealing.deal(text.at, len(text.row))
                if dealt is None or dealt[0] != self.rank:
                    continue
                segment, first_segment = max(dealt[1], first_segment), 0
                position = TextPosition(at=text.at, reader=text.reader, dealing=before, segment=segment)
                yield RankDocument(position=position, index=text.index, hash=document, row=text.row)

    def check(self, start: TextPosition) -> None:
        """Check that a position lies in the dataset.

        Raises:
            ValueError: it is beyond the last part or the last document.
        """
        part, number = start.at
        if part >= self.source.parts or (
            isinstance(self.source, IndexedSource) and number >= len(self.source)
        ):
            raise ValueError(
                f"the position in the text is document {number:,} of part {part}, beyond the end of the dataset: take "
                "another checkpoint or cache, or the dataset that it was made with"
            )

    def dealt_again(self, start: TextPosition | None, frontiers: Sequence[Place], ranks: int) -> DealingState:
        """Assign the documents that an earlier number of ranks had not finished to the present ranks.

        Args:
            start: position of the first unfinished document; None for the start of the epoch.
            frontiers: for each earlier rank, the first place that it had not finished.
            ranks: the earlier number of ranks.
        """
        earlier = Dealing.from_state(start.dealing) if start else self._dealing(ranks)
        earlier.frontiers = list(frontiers)
        dealing = self._dealing(self.ranks)
        dealing.earlier = earlier
        return dealing.state()

    def _dealing(self, ranks: int) -> Dealing:
        return Dealing(ranks=ranks, by_shards=self.source.parts > 1 and self.source.parts % ranks == 0)
