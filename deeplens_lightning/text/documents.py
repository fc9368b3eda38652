"""Documents of a source for one rank and one split, tokenised.

In: a `Source`. Out: `TokenizedDocument`s in the epoch's order, each with a cursor from which it comes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from deeplens_lightning.text.packing import TokenizedDocument
from deeplens_lightning.text.sources import Row, Source, Text

Split = Literal["train", "heldout"]
Place = tuple[int, int, int]
"""Shard, number in the shard, segment: a point in the epoch's order that holds for all ranks."""

GROUP = 64
"""Documents tokenised at once."""


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


@dataclass(slots=True)
class Dealing:
    """Who gets which document: the same answer on every rank.

    Whole shards go round where their number divides by the number of ranks; else each document goes to the rank
    with the fewest characters so far. After a change of the number of ranks, the documents that the earlier
    ranks had not finished are dealt anew: the earlier dealing is asked first, and passes on what lies at or
    beyond the frontier of the rank that it names.

    Attributes:
        ranks: how many.
        by_shards: whole shards go round.
        loads: characters dealt to each rank.
        frontiers: the first place not finished, per rank; empty while it deals to the ranks there are now.
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
        """The rank that a document goes to and the segment to begin with, or None if it was finished.

        Must be asked for every document of the split, in order.
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

    def skips(self, shard: int, rank: int) -> bool:
        """Whether a shard need not be read by this rank at all."""
        return self.by_shards and self.earlier is None and shard % self.ranks != rank

    def state_dict(self) -> dict[str, Any]:
        """JSON-like, and a copy."""
        return {
            "ranks": self.ranks,
            "by_shards": self.by_shards,
            "loads": list(self.loads),
            "frontiers": [list(place) for place in self.frontiers],
            "earlier": self.earlier.state_dict() if self.earlier else None,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Dealing:
        """The inverse of `state_dict`."""
        return cls(
            ranks=state["ranks"],
            by_shards=state["by_shards"],
            loads=list(state["loads"]),
            frontiers=[(place[0], place[1], place[2]) for place in state["frontiers"]],
            earlier=cls.from_state_dict(state["earlier"]) if state["earlier"] else None,
        )


@dataclass(kw_only=True)
class Documents:
    """The documents of one split that one rank reads.

    Attributes:
        source: all documents.
        tokenizer: unused for documents that are token ids already.
        split: `train`, or `heldout`.
        val_fraction: share of documents held out, by the hash of their text.
        seed: what the order is drawn from.
        rank: this one.
        ranks: of how many.
        empty: documents without a token, skipped so far.
    """

    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    split: Split
    val_fraction: float
    seed: int
    rank: int = 0
    ranks: int = 1
    empty: int = 0

    def read(self, epoch: int, cursor: dict[str, Any] | None = None) -> Iterator[TokenizedDocument]:
        """This rank's documents of an epoch, from the beginning or from a cursor on."""
        pending: list[tuple[Text, dict[str, Any], int, int]] = []
        for text, here, document, segment in self._mine(epoch, cursor):
            pending.append((text, here, document, segment))
            if len(pending) == GROUP:
                yield from self._tokenized(pending)
                pending = []
        yield from self._tokenized(pending)

    def _mine(
        self, epoch: int, cursor: dict[str, Any] | None
    ) -> Iterator[tuple[Text, dict[str, Any], int, int]]:
        shard, number = cursor["at"] if cursor else (0, 0)
        state = cursor["state"] if cursor else None
        dealing = Dealing.from_state_dict(cursor["dealing"]) if cursor else self._dealing(self.ranks)
        for k in range(shard, self.source.shards):
            if dealing.skips(k, self.rank):
                continue
            first = number if k == shard else 0
            for text in self.source.read(
                k, first, seed=self.seed, epoch=epoch, state=state if k == shard else None
            ):
                document = document_hash(text.row)
                if is_heldout(document, self.val_fraction) != (self.split == "heldout"):
                    continue
                here = {"at": list(text.at), "state": text.state, "dealing": dealing.state_dict()}
                dealt = dealing.deal(text.at, len(text.row))
                if dealt is not None and dealt[0] == self.rank:
                    yield text, here, document, dealt[1]

    def dealt_again(
        self, cursor: dict[str, Any] | None, frontiers: Sequence[Place], ranks: int
    ) -> dict[str, Any]:
        """The state of a dealing that gives today's ranks what `ranks` earlier ones had not finished.

        Args:
            cursor: where the first of those documents is; None at the very beginning.
            frontiers: of each earlier rank.
            ranks: how many there were.
        """
        earlier = Dealing.from_state_dict(cursor["dealing"]) if cursor else self._dealing(ranks)
        earlier.frontiers = list(frontiers)
        dealing = self._dealing(self.ranks)
        dealing.earlier = earlier
        return dealing.state_dict()

    def _dealing(self, ranks: int) -> Dealing:
        return Dealing(ranks, by_shards=self.source.shards > 1 and self.source.shards % ranks == 0)

    def _tokenized(
        self, group: Sequence[tuple[Text, dict[str, Any], int, int]]
    ) -> Iterator[TokenizedDocument]:
        tokens = tokenize([text.row for text, *_ in group], self.tokenizer)
        for (text, here, document, segment), ids in zip(group, tokens, strict=True):
            if len(ids) == 0:
                self.empty += 1
                continue
            yield TokenizedDocument(
                cursor=here, index=text.index, hash=document, tokens=ids, first_segment=segment
            )


def tokenize(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Token ids of texts, without special tokens around them; rows of token ids are taken as they are.

    White space alone counts as no text.

    Raises:
        ValueError: there are texts and no tokenizer.
    """
    texts = [row for row in rows if isinstance(row, str)]
    if len(texts) < len(rows):
        return [np.asarray(row, dtype=np.int64) for row in rows]
    if not texts:
        return []
    if tokenizer is None:
        raise ValueError(
            "these documents are texts and the model has no tokenizer of its own: give tokenizer="
        )
    if tokenizer.is_fast:  # the same ids as calling the tokenizer gives, without offsets, words and masks
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encoded]
    else:
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [np.asarray(i if text.strip() else [], dtype=np.int64) for text, i in zip(texts, ids, strict=True)]


def special_affixes(
    tokenizer: PreTrainedTokenizerBase | None, prepend_bos: bool | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that go before and behind every segment.

    Args:
        tokenizer: the model's.
        prepend_bos: None for what the tokenizer itself puts around a text, True for a BOS in front whatever it
            does, False for nothing.

    Raises:
        ValueError: a BOS is wanted and the tokenizer has none.
    """
    if tokenizer is None or prepend_bos is False:
        return (), ()
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    first = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    prefix, suffix = tuple(whole[:first]), tuple(whole[first + len(bare) :])
    if prepend_bos and not prefix:
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
        if bos is None:
            raise ValueError("prepend_bos=True, but the tokenizer has no BOS token; leave prepend_bos out")
        prefix = (int(bos),)
    return prefix, suffix
