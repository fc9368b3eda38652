"""Tokenise and pack one rank's documents in a `torchdata.nodes` pipeline.

    documents -> Batcher -> Mapper(tokenise) -> packing [-> Prefetcher]

In: one rank's documents. Out: chunks of blocks. Each chunk carries its own position, so a position does not depend on
how far a node has read ahead, and the nodes' own states are not used. If the model is on the CPU, the pipeline has no
threads. If it is on an accelerator, `threads` threads tokenise, in order, and one more thread packs chunks ahead.

Every call builds a new pipeline over a new iterator of the source: a node waits only half a second for its thread to
end, and a thread that is still running must not read from an iterator that is in use.
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
"""Number of documents that are tokenised together."""
CHUNKS_AHEAD = 2
"""Number of chunks that are packed ahead if there are threads."""


@dataclass(frozen=True, kw_only=True)
class TextStage:
    """Tokenise and pack the text of one rank and one split.

    Attributes:
        documents: the documents of this rank and split.
        tokenizer: tokenizer for documents that are text; None if documents are token ids.
        packing: the settings of packing.
        threads: number of threads that tokenise while the model runs; 0 to tokenise in the calling thread.
    """

    documents: Documents
    tokenizer: PreTrainedTokenizerBase | None
    packing: Packing
    threads: int = 0

    def tokenized(self, epoch: int, start: TextPosition | None = None) -> Iterator[TokenizedDocument]:
        """Iterate over this rank's tokenised documents of an epoch, without threads; some may have no token.

        Args:
            epoch: number of the epoch.
            start: position of the first document; None for the start of the epoch.
        """
        return chain.from_iterable(self._groups(epoch, start, threads=0))

    def chunks(self, epoch: int, start: TextPosition | None = None) -> Iterator[Chunk]:
        """Iterate over the packed chunks of an epoch.

        Args:
            epoch: number of the epoch.
            start: position of the first segment; None for the start of the epoch.
        """
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
