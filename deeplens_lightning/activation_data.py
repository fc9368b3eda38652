"""`ActivationData`: the properties of a data module that SAEs and callbacks read.

In: the data module of a Trainer. Out: its model, hook points, widths, scaling, text and provenance, as far as it has
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ParallelStrategy

from deeplens_lightning.normalization import Scaling
from deeplens_lightning.types import Batch, Provenance

T = TypeVar("T")


class NotSetUpError(RuntimeError):
    """A data module has nothing loaded: `setup` was not called, or it was closed."""


class ActivationData:
    """Base class that describes the batches of a data module; every property is empty unless a subclass overrides it.

    `ActivationDataModule` is a subclass. A data module of your own can inherit from both `ActivationData` and
    `LightningDataModule`, and override the properties that apply to it.

    Attributes:
        model_kwargs: keyword arguments for `from_pretrained` of `hf_model`.
        batch_size: rows per batch.
        max_tokens: rows per Trainer epoch, the sum over all ranks.
        val_rows: the requested number of rows in the validation set.
    """

    model_kwargs: Mapping[str, Any] | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    val_rows: int | None = None

    @property
    def hf_model(self) -> Any:
        """The language model that the rows were computed with, or its name."""
        return None

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Canonical names of the hook points in a batch, for example `("layers.6.mlp_out",)`."""
        return ()

    @property
    def d_in(self) -> int | dict[str, int] | None:
        """Width of the rows; a dict by hook point if there are several hook points."""
        return None

    @property
    def scaling(self) -> Scaling | dict[str, Scaling] | None:
        """The normalisation applied to batches; a dict by hook point if there are several hook points."""
        return None

    @property
    def model(self) -> Any:
        """The `model.frozen.FrozenModel` that computes the rows; None if no model is loaded."""
        return None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the token ids in the provenance belong to."""
        return None

    @property
    def prepend_bos(self) -> bool | None:
        """Whether segments begin with a BOS token; None for the tokenizer's own behaviour."""
        return None

    @property
    def documents(self) -> Any:
        """The documents as a `text.sources.IndexedSource`, indexed by `Provenance.document_index`.

        None if a document cannot be read by its index, as in a streamed dataset.
        """
        return None

    @property
    def packing(self) -> Any:
        """The `text.packing.Packing` that cut the documents into segments."""
        return None

    def provenance(self, batch: Batch) -> Provenance | None:  # noqa: ARG002
        """The provenance of a batch: document, position and token id of each row; None if unknown."""
        return None

    def provenance_later(self, batch: Batch) -> Callable[[], Provenance | None]:
        """A function that returns the provenance of a batch, also after the batch is freed."""
        found = self.provenance(batch)
        return lambda: found

    def heldout_blocks(self, rows: int) -> Iterator[Any] | None:  # noqa: ARG002
        """Held-out text as `text.packing.Blocks` with at least `rows` rows; None if the data module has no text."""
        return None


def data_parallel_ranks(trainer: Trainer) -> int:
    """Number of ranks that train on different rows; with tensor parallelism several processes share the same rows."""
    strategy = trainer.strategy
    sampled = strategy.distributed_sampler_kwargs if isinstance(strategy, ParallelStrategy) else {}
    return int(sampled.get("num_replicas", 1))


def activation_data(trainer: Trainer) -> ActivationData:
    """The Trainer's data module if it is an `ActivationData`, otherwise an empty `ActivationData`."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, ActivationData) else ActivationData()


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks in their order: its own list, so that a callback can be added to it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def one_or_all(values: Mapping[str, T]) -> T | dict[str, T]:
    """The value of the only hook point; with several hook points a dict of them by canonical name."""
    return next(iter(values.values())) if len(values) == 1 else dict(values)
