"""Find the text around a row from its provenance, with a latent's activation on every token.

In: the row with its latent and provenance (`TopRow`). Out: a `Context`. The data module gives the document's tokens.
Where it has a model, the segment runs through the model and the SAE again, so that each token of the context has its
activation; elsewhere only the row's own token has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deeplens_lightning.activation_data import ActivationData
from deeplens_lightning.callbacks.sae_view import SaeView
from deeplens_lightning.callbacks.top_rows import TopRow
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.reporting.readable_tokens import token_strings, visible
from deeplens_lightning.text.documents import document_hash
from deeplens_lightning.text.packing import Packing
from deeplens_lightning.text.sources import IndexedSource
from deeplens_lightning.text.tokens import tokenize

_BATCH = 16  # segments in a model batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Tokens of a document around one on which a latent fires strongly.

    Attributes:
        value: the latent's activation on the token at `peak`.
        tokens: text of each token.
        values: the latent's activation on each token; None where unknown.
        peak: index of the row's own token in `tokens`.
        document: number of the document in its source.
        position: position of the row's own token in the document.
    """

    value: float
    tokens: list[str]
    values: list[float | None]
    peak: int
    document: int
    position: int

    def __str__(self) -> str:
        shown = [visible(token) for token in self.tokens]
        shown[self.peak] = f"«{shown[self.peak]}»"
        return "".join(shown)

    def as_json(self) -> dict[str, Any]:
        """The fields as a dict for `top_tokens/latents.json`, which the report reads."""
        return {
            "value": self.value,
            "tokens": self.tokens,
            "values": self.values,
            "peak": self.peak,
            "document": self.document,
            "position": self.position,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """A segment as the model reads it, cut after the last token to show.

    Attributes:
        ids: token ids, special tokens included.
        peak: index of the row's own token in `ids`.
        first: index of the first token to show.
    """

    ids: list[int]
    peak: int
    first: int


class ContextReader:
    """Read contexts of rows through the data module that served them.

    Args:
        data: the data module. Where it cannot read a document again (streamed text, shards), a context is the row's
            own token alone.
        sae: the SAE whose latents are shown.
        before: number of tokens to show before the row's own.
        after: number of tokens to show after it.
    """

    def __init__(self, data: ActivationData, sae: SaeView, before: int, after: int) -> None:
        self.sae = sae
        self.before, self.after = before, after
        self.tokenizer: PreTrainedTokenizerBase | None = data.tokenizer
        self._source: IndexedSource | None = data.documents
        self._packing: Packing | None = data.packing
        frozen: FrozenModel | None = data.model
        # Without isolation a segment's activations depend on the rest of its block, which is not known here.
        self._model = frozen if frozen is not None and frozen.isolation != "none" else None
        self._known: dict[int, Sequence[int] | None] = {}

    def read(self, rows: Sequence[TopRow]) -> list[Context]:
        """Return one context for each row, in order; call it in `evaluation_mode`."""
        segments = [self._segment(row) for row in rows]
        activations = self._activations([row.latent for row in rows], segments)
        return [
            self._context(row, segment, on_tokens)
            for row, segment, on_tokens in zip(rows, segments, activations, strict=True)
        ]

    def _segment(self, row: TopRow) -> _Segment | None:
        """The segment that held the row; None where its document cannot be read or does not hold that token."""
        packing = self._packing
        document = self._document(row.document_index, row.document_hash)
        if document is None or packing is None:
            return None
        if not 0 <= row.position < len(document) or int(document[row.position]) != row.token_id:
            return None
        start = row.position // packing.segment_tokens * packing.segment_tokens
        end = min(start + packing.segment_tokens, len(document), row.position + 1 + self.after)
        ids = [*packing.prefix, *(int(i) for i in document[start:end])]
        peak = len(packing.prefix) + row.position - start
        return _Segment(ids=ids, peak=peak, first=max(0, peak - self.before))

    def _document(self, index: int, expected_hash: int) -> Sequence[int] | None:
        """Token ids of a document; None where the source has no document of that hash at that index."""
        if index not in self._known:
            self._known[index] = None
            if self._source is not None and 0 <= index < len(self._source):
                row = self._source.rows[index]
                if document_hash(row) == expected_hash:
                    self._known[index] = tokenize([row], self.tokenizer)[0].tolist()
        return self._known[index]

    def _activations(
        self, latents: Sequence[int], segments: Sequence[_Segment | None]
    ) -> list[list[float] | None]:
        """Each latent's activation on every token of its segment; None where there is no model or no segment."""
        activations: list[list[float] | None] = [None] * len(segments)
        if self._model is None or not {p.name for p in self._model.hook_points} >= set(self.sae.reads):
            return activations
        found = [(i, segment.ids) for i, segment in enumerate(segments) if segment is not None]
        found.sort(key=lambda item: len(item[1]))  # similar lengths together: less padding
        for start in range(0, len(found), _BATCH):
            group = found[start : start + _BATCH]
            rows = self._run([ids for _, ids in group])
            for row, (i, ids) in enumerate(group):
                z = self.sae.encode({name: x[row, : len(ids)] for name, x in rows.items()})
                activations[i] = z[:, latents[i]].float().cpu().tolist()
        return activations

    def _run(self, ids: Sequence[list[int]]) -> Mapping[str, Tensor]:
        """Raw activations `(batch, seq_length, d_in)` by hook point that the SAE reads, on the SAE's device."""
        assert self._model is not None
        length = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        rows = self._model.activations(tokens, None, None if bool(mask.all()) else mask)
        return {name: rows[name].to(self.sae.device) for name in self.sae.reads}

    def _context(self, row: TopRow, segment: _Segment | None, activations: list[float] | None) -> Context:
        ids, peak, value = [row.token_id], 0, row.value
        if segment is not None:
            ids, peak = segment.ids[segment.first :], segment.peak - segment.first
        values: list[float | None] = [None] * len(ids)
        if segment is not None and activations is not None:
            values = list(activations[segment.first :])
            value = activations[segment.peak]
        else:
            values[peak] = value
        return Context(
            value=value,
            tokens=token_texts(self.tokenizer, ids),
            values=values,
            peak=peak,
            document=row.document_index,
            position=row.position,
        )


def token_texts(tokenizer: PreTrainedTokenizerBase | None, ids: Sequence[int]) -> list[str]:
    """The text of each token; without a tokenizer its id in brackets."""
    return [f"[{i}]" for i in ids] if tokenizer is None else token_strings(tokenizer, ids)
