"""Search rows in the order of their text for those on which chosen latents are most active, with the text around them.

In: an SAE whose weights do not change any more, and raw rows with their provenance. Out: the strongest contexts of each
latent. A context is made of neighbouring rows, so that it needs neither the documents nor the model: cached rows and rows
of a streamed dataset have contexts too. Tokens that are left out of the rows (special tokens) are not shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deeplens_lightning.activation_data import activation_data
from deeplens_lightning.callbacks.sae_view import SaeView
from deeplens_lightning.callbacks.support import RawRows
from deeplens_lightning.callbacks.token_contexts import Context, token_texts
from deeplens_lightning.stream.validation_set import RowsLoader

_CHUNK = 2**16  # rows whose activations are in memory together

HELD_OUT = 2**16
"""Largest number of held-out rows that a callback searches."""

OrderedRows = Iterable[tuple[Mapping[str, Tensor], Tensor]]
"""Raw rows `(n, d_in)` by hook point and their provenance, int64 `(n, 4)`, in the order of the text."""


class NoContextsError(ValueError):
    """There are no rows, or their tokens are unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentContexts:
    """Where one latent is most active.

    Attributes:
        latent: its number.
        frequency: share of the rows on which it is above 0.
        contexts: the strongest first.
    """

    latent: int
    frequency: float
    contexts: list[Context]

    def __str__(self) -> str:
        lines = [f"latent {self.latent}, above 0 on {self.frequency:.3%} of the rows"]
        lines += [f"{context.value:10.4g}  {context}" for context in self.contexts]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundContexts:
    """The contexts of several latents of one SAE.

    Attributes:
        sae: name of the SAE in a grid; "" for a single one.
        reads: the hook points that the SAE reads.
        rows: number of rows searched.
        latents: the latents in the order asked for.
    """

    sae: str
    reads: tuple[str, ...]
    rows: int
    latents: list[LatentContexts]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.latents))

    def as_json(self, step: int) -> dict[str, Any]:
        """The content of a `latents.json`, which the report reads.

        Args:
            step: optimizer steps that the SAE had been trained for.
        """
        return {
            "step": step,
            "rows": self.rows,
            "sae": self.sae,
            "reads": list(self.reads),
            "latents": [
                {
                    "latent": each.latent,
                    "frequency": each.frequency,
                    "contexts": [context.as_json() for context in each.contexts],
                }
                for each in self.latents
            ],
        }


def search(
    sae: SaeView,
    rows: OrderedRows,
    latents: int | Sequence[int],
    *,
    keep: int,
    before: int,
    after: int,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int = 0,
) -> FoundContexts:
    """Encode rows and keep the strongest contexts of chosen latents; call it in `evaluation_mode`.

    Args:
        sae: the SAE.
        rows: what to search.
        latents: numbers of the latents, or how many to choose at random.
        keep: number of contexts of each latent.
        before: number of tokens to show before the row's own.
        after: number of tokens to show after it.
        tokenizer: turns token ids into text; None shows the ids.
        seed: seed of the random choice.

    Raises:
        ValueError: the SAE does not have such a latent.
        NoContextsError: there are no rows, or their tokens are unknown.
    """
    found: _Strongest | None = None
    for raw, provenance in rows:
        columns = []
        for z in sae.encode_parts({name: raw[name].to(sae.device) for name in sae.reads}):
            if found is None:
                chosen = choose_latents(latents, z.shape[1], seed)
                found = _Strongest(chosen, keep=keep, before=before, after=after)
            columns.append(z[:, found.latents])
        assert found is not None
        found.add(torch.cat(columns), provenance)
    if found is None:
        raise NoContextsError("there are no rows to search: give other text or another cache")
    return found.found(sae, tokenizer)


def heldout_rows(trainer: Trainer, hooks: Sequence[str]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Up to `HELD_OUT` of the rows that this rank validates on, raw, with their provenance; none without validation.

    Args:
        trainer: the Trainer.
        hooks: hook points of the rows.
    """
    loader, data, raw, count = trainer.val_dataloaders, activation_data(trainer), RawRows(), 0
    if not isinstance(loader, RowsLoader):  # of a data module that does not know where its rows are from
        return
    for batch in loader:
        origins = data.provenance(batch)
        if origins is None or count >= HELD_OUT:
            return
        rows = raw.of(trainer, batch, hooks)
        count += len(origins.position)
        yield rows, origins.stacked()


def choose_latents(latents: int | Sequence[int], d_sae: int, seed: int) -> list[int]:
    """Numbers of latents: those given, or as many as asked for, chosen at random.

    Raises:
        ValueError: the SAE does not have such a latent.
    """
    if isinstance(latents, int):
        return sorted(np.random.default_rng(seed).permutation(d_sae)[:latents].tolist())
    wrong = [latent for latent in latents if not 0 <= latent < d_sae]
    if wrong:
        raise ValueError(f"latents={wrong} do not exist: this SAE has latents 0 to {d_sae - 1}")
    return list(dict.fromkeys(latents))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A context whose tokens are ids; the fields are those of `Context`."""

    value: float
    ids: list[int]
    values: list[float]
    peak: int
    document: int
    position: int


class _Strongest:
    """Keep the strongest rows of each latent, and their neighbours, from one batch of ordered rows after another."""

    def __init__(self, latents: Sequence[int], *, keep: int, before: int, after: int) -> None:
        self.latents, self._keep, self._before, self._after = list(latents), keep, before, after
        self._chunk = max(_CHUNK, 4 * (before + after))
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_rows = 0
        self._first = 0  # of the waiting rows, those before are only neighbours of later ones
        self._rows = 0
        self._fired = torch.zeros(len(latents), dtype=torch.int64)
        self._top: list[list[_Found]] = [[] for _ in latents]
        self._known_tokens = False

    def add(self, activations: Tensor, provenance: Tensor) -> None:
        """Take activations `(n, latents)` of rows and their provenance, int64 `(n, 4)`."""
        self._waiting.append((activations.float().cpu(), provenance.cpu()))
        self._waiting_rows += len(provenance)
        if self._waiting_rows >= self._chunk:
            self._merge(self._after)

    def found(self, sae: SaeView, tokenizer: PreTrainedTokenizerBase | None) -> FoundContexts:
        """The strongest contexts of all rows."""
        self._merge(0)
        if not self._known_tokens:
            raise NoContextsError(
                "the rows have no token ids, as in shards of bare tensors: give text, or a cache written by extract"
            )
        return FoundContexts(
            sae=sae.name,
            reads=sae.reads,
            rows=self._rows,
            latents=[
                LatentContexts(
                    latent=latent,
                    frequency=int(fired) / self._rows,
                    contexts=[
                        Context(
                            value=found.value,
                            tokens=token_texts(tokenizer, found.ids),
                            values=list(found.values),
                            peak=found.peak,
                            document=found.document,
                            position=found.position,
                        )
                        for found in top
                    ],
                )
                for latent, fired, top in zip(self.latents, self._fired, self._top, strict=True)
            ],
        )

    def _merge(self, after: int) -> None:
        """Take the strongest of the waiting rows, but for the last `after` ones, whose neighbours are still to come."""
        activations, places = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        activations = activations.where(activations.isfinite(), 0.0)
        start, end = self._first, len(places) - after
        part = activations[start:end]
        self._rows += len(part)
        self._fired += (part > 0).sum(0)
        self._known_tokens |= bool((places[:, 3] >= 0).any())
        values, index = part.topk(min(self._keep, len(part)), dim=0)
        z, place = activations.numpy(), places.numpy()
        for column, top in enumerate(self._top):
            least = top[-1].value if len(top) == self._keep else 0.0
            for value, row in zip(values[:, column].tolist(), index[:, column].tolist(), strict=True):
                if value > least:
                    top.append(self._cut(z[:, column], place, start + row))
            top.sort(key=lambda found: -found.value)
            del top[self._keep :]
        kept = max(0, end - self._before)
        self._first, self._waiting_rows = end - kept, len(places) - kept
        self._waiting = [(activations[kept:].clone(), places[kept:].clone())]

    def _cut(self, z: NDArray[np.float32], place: NDArray[np.int64], row: int) -> _Found:
        """The rows around one that continue the same document without a break in their order."""
        first = last = row
        while first > max(0, row - self._before) and _follows(place[first - 1], place[first]):
            first -= 1
        while last + 1 < min(len(place), row + self._after + 1) and _follows(place[last], place[last + 1]):
            last += 1
        return _Found(
            value=float(z[row]),
            ids=place[first : last + 1, 3].tolist(),
            values=z[first : last + 1].tolist(),
            peak=row - first,
            document=int(place[row, 1]),
            position=int(place[row, 2]),
        )


def _follows(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    """Whether a row is of the same document as the one before it, and later in it."""
    return bool((one[:2] == other[:2]).all() and one[2] < other[2])
