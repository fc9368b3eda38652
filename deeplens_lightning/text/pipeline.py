"""The text stage as a `torchdata.nodes` pipeline: documents, groups of them, token ids, packed chunks.

    documents -> Batcher -> Mapper(tokenise) -> packing [-> Prefetcher]

In: one rank's documents. Out: chunks of blocks, each with its own position, so that a position never depends on
how far a node has read ahead. In turn with the model no node has a thread; beside it (an accelerator) tokenising
runs in `threads` threads, in order, and chunks are packed ahead in one more. The pipeline is built anew for every
start over a new iterator of the source, so that a thread that outlives its join (nodes wait half a second) reads
only what nobody else does; the nodes' own states are not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from torchdata.nodes import BaseNode, Batcher, IterableWrapper, Mapper, ParallelMapper, Prefetcher
from transformers import PreTrainedTokenizerBase

from deeplens_lightning.text.documents import Documents, RankDocument
from deeplens_lightning.text.packing import Chunk, Packing, TokenizedDocument
from deeplens_lightning.text.tokens import tokenize
from deeplens_lightning.types import TextPosition

GROUP = 64
"""Documents tokenised at once."""
CHUNKS_AHEAD = 2
"""Chunks that are packed before they are needed, where there are threads."""


@dataclass(frozen=True, kw_only=True)
class TextStage:
    """Tokenised and packed text of one rank and one split.

    Attributes:
        documents: what this rank reads.
        tokenizer: not used for documents that are token ids already; None where there is none.
        packing: how segments become blocks.
        threads: threads that tokenise beside the model; 0 to tokenise in turn with it.
    """

    documents: Documents
    tokenizer: PreTrainedTokenizerBase | None
    packing: Packing
    threads: int = 0

    def tokenized(self, epoch: int, start: TextPosition | None = None) -> Iterator[TokenizedDocument]:
        """This rank's documents of an epoch from a position on, tokenised in turn; some may hold no token."""
        return chain.from_iterable(self._groups(epoch, start, threads=0))

    def chunks(self, epoch: int, start: TextPosition | None = None) -> Iterator[Chunk]:
        """Packed chunks of an epoch, from its start or from a position on."""
        groups = self._groups(epoch, start, self.threads)
        chunks: Iterator[Chunk] = self.packing.chunks(chain.from_iterable(groups))
        return Prefetcher(IterableWrapper(chunks), CHUNKS_AHEAD) if self.threads else chunks

    def _groups(
        self, epoch: int, start: TextPosition | None, threads: int
    ) -> BaseNode[list[TokenizedDocument]]:
        documents: BaseNode[RankDocument] = IterableWrapper(self.documents.read(epoch, start))
        batches = Batcher(documents, GROUP, drop_last=False)
        if threads:
            return ParallelMapper(batches, self._tokenize, threads, in_order=True, method="thread")
        return Mapper(batches, self._tokenize)

    def _tokenize(self, group: list[RankDocument]) -> list[TokenizedDocument]:
        tokens = tokenize([document.row for document in group], self.tokenizer)
        return [
            TokenizedDocument(
                position=document.position, index=document.index, hash=document.hash, tokens=ids
            )
            for document, ids in zip(group, tokens, strict=True)
        ]
