"""What SAEs and callbacks may ask of a data module.

In: the data module of a Trainer. Out: `ActivationData`, which a data module inherits to say what its batches are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer

from deeplens_lightning.normalization import Scaling
from deeplens_lightning.types import Batch, Provenance


class ActivationData:
    """What SAEs and callbacks may ask of a data module; nothing is known unless a subclass says so.

    `ActivationDataModule` is one. A data module of your own may inherit from this class beside
    `LightningDataModule` and set what it knows.

    Attributes:
        model_kwargs: for `from_pretrained` of that model.
        batch_size: rows a batch.
        max_tokens: rows that one Trainer epoch takes, over all ranks.
        val_rows: rows wanted for the validation set.
    """

    model_kwargs: Mapping[str, Any] | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    val_rows: int | None = None

    @property
    def hf_model(self) -> Any:
        """The model that the rows were computed with, or its name."""
        return None

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Canonical names of the hook points that batches hold."""
        return ()

    @property
    def d_in(self) -> int | dict[str, int] | None:
        """Width of the rows; by hook point if there are several."""
        return None

    @property
    def scaling(self) -> Scaling | dict[str, Scaling] | None:
        """The normalisation of served batches; by hook point if there are several. All ranks must ask together."""
        return None

    @property
    def model(self) -> Any:
        """The `model.frozen.FrozenModel` that computes the rows, while there is one."""
        return None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the rows' tokens."""
        return None

    @property
    def prepend_bos(self) -> bool | None:
        """Whether segments begin with a BOS; None for what the tokenizer does."""
        return None

    @property
    def documents(self) -> Any:
        """The documents that provenance counts, as a `text.sources.IndexedSource` where they can be read again."""
        return None

    @property
    def packing(self) -> Any:
        """The `text.packing.Packing` that cut the documents into segments."""
        return None

    def provenance(self, batch: Batch) -> Provenance | None:  # noqa: ARG002
        """Where the rows of a batch came from."""
        return None

    def heldout_blocks(self, rows: int) -> Iterator[Any] | None:  # noqa: ARG002
        """Held-out text as `text.packing.Blocks` with at least `rows` rows, where there is text."""
        return None


def activation_data(trainer: Trainer) -> ActivationData:
    """The Trainer's data module, or an `ActivationData` that knows nothing in place of another kind."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, ActivationData) else ActivationData()
