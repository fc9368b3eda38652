"""From a row's provenance to the text around it, with a latent's activation on every token.

In: which latent, how strong, and where the row came from. Out: `Context`s. The document's tokens come
from the data module; where it has a live model the segment is run again, so that each token of the
context is shaded by the SAE as it is now; else only the row's own token has a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deeplens_lightning.callbacks.sae_view import SaeView
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.reporting.readable_tokens import token_strings
from deeplens_lightning.text.documents import document_hash
from deeplens_lightning.text.packing import Packing
from deeplens_lightning.text.sources import IndexedSource
from deeplens_lightning.text.tokens import tokenize

Wanted = tuple[int, float, Sequence[int]]
"""Latent, its activation, and `(document hash, document index, position, token id)`."""

_BATCH = 16


@dataclass(frozen=True, slots=True)
class Context:
    """Some tokens of a document around the one on which a latent was strong.

    Attributes:
        value: the latent's activation on the token at `peak`.
        tokens: their texts.
        values: the latent's activation on each; None where it is not known.
        peak: which token it is.
        document: the document's number in the source.
        position: the token's position in the document.
    """

    value: float
    tokens: list[str]
    values: list[float | None]
    peak: int
    document: int
    position: int

    def as_json(self) -> dict[str, Any]:
        """As the report reads it."""
        return {
            "value": self.value,
            "tokens": self.tokens,
            "values": self.values,
            "peak": self.peak,
            "document": self.document,
            "position": self.position,
        }


@dataclass(frozen=True, slots=True)
class _Segment:
    """A segment as the model saw it, special tokens included, up to the last token shown."""

    ids: list[int]
    peak: int
    first: int


class ContextReader:
    """Reads contexts through a data module.

    Args:
        datamodule: whose rows they are. Where the text of a document cannot be had again (streams, shards),
            only the row's own token is shown.
        sae: whose latents.
        before: tokens shown before the peak.
        after: tokens shown after it.
    """

    def __init__(self, datamodule: Any, sae: SaeView, before: int, after: int) -> None:
        self.sae = sae
        self.before, self.after = before, after
        self.tokenizer = getattr(datamodule, "tokenizer", None)
        text = getattr(datamodule, "source", None)
        source, packing = getattr(text, "source", None), getattr(text, "packing", None)
        self._source = source if isinstance(source, IndexedSource) else None
        self._packing = packing if isinstance(packing, Packing) else None
        frozen = getattr(datamodule, "model", None)
        whole = isinstance(frozen, FrozenModel) and frozen.isolation != "none"
        self._model: FrozenModel | None = frozen if whole else None
        self._known: dict[int, Sequence[int] | None] = {}

    def read(self, wanted: Sequence[Wanted]) -> list[Context]:
        """One context per row, in their order; call it under `observing`."""
        segments = [self._segment(place) for _, _, place in wanted]
        shades = self._shades([w[0] for w in wanted], segments)
        return [self._context(w, s, shade) for w, s, shade in zip(wanted, segments, shades, strict=True)]

    def _segment(self, place: Sequence[int]) -> _Segment | None:
        identity, index, position, token = place
        packing = self._packing
        document = self._document(index, identity)
        if document is None or packing is None:
            return None
        if not 0 <= position < len(document) or int(document[position]) != token:
            return None
        start = position // packing.segment_tokens * packing.segment_tokens
        end = min(start + packing.segment_tokens, len(document), position + 1 + self.after)
        ids = [*packing.prefix, *(int(i) for i in document[start:end])]
        peak = len(packing.prefix) + position - start
        return _Segment(ids, peak, max(0, peak - self.before))

    def _document(self, index: int, document: int) -> Sequence[int] | None:
        """A document's token ids, if the source still has the one of that hash under that number."""
        if index not in self._known:
            self._known[index] = None
            if self._source is not None and 0 <= index < len(self._source):
                row = self._source.rows[index]
                if document_hash(row) == document:
                    self._known[index] = tokenize([row], self.tokenizer)[0].tolist()
        return self._known[index]

    def _shades(
        self, latents: Sequence[int], segments: Sequence[_Segment | None]
    ) -> list[list[float] | None]:
        """The latent's activation on every token of each segment."""
        shades: list[list[float] | None] = [None] * len(segments)
        if self._model is None or not {p.name for p in self._model.hook_points} >= set(self.sae.reads):
            return shades
        order = sorted(
            (i for i, s in enumerate(segments) if s is not None), key=lambda i: len(_ids(segments[i]))
        )
        for start in range(0, len(order), _BATCH):
            group = order[start : start + _BATCH]
            rows = self._run([_ids(segments[i]) for i in group])
            for row, i in enumerate(group):
                n = len(_ids(segments[i]))
                z = self.sae.encode({name: x[row, :n] for name, x in rows.items()})
                shades[i] = z[:, latents[i]].float().cpu().tolist()
        return shades

    def _run(self, ids: Sequence[list[int]]) -> Mapping[str, Tensor]:
        assert self._model is not None
        length = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        rows = self._model.activations(tokens, None, None if bool(mask.all()) else mask)
        return {name: rows[name].to(self.sae.module.device) for name in self.sae.reads}

    def _context(self, wanted: Wanted, segment: _Segment | None, shade: list[float] | None) -> Context:
        _, value, (_, document, position, token) = wanted
        if segment is None:
            return Context(value, self._texts([token]), [value], 0, document, position)
        ids, peak = segment.ids[segment.first :], segment.peak - segment.first
        values: list[float | None] = [None] * len(ids)
        if shade is not None:
            values = list(shade[segment.first :])
            value = shade[segment.peak]
        else:
            values[peak] = value
        return Context(value, self._texts(ids), values, peak, document, position)

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return [f"[{i}]" for i in ids] if self.tokenizer is None else token_strings(self.tokenizer, ids)


def _ids(segment: _Segment | None) -> list[int]:
    assert segment is not None
    return segment.ids
