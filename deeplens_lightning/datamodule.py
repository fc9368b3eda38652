"""`ActivationDataModule`: a LightningDataModule whose batches are a language model's activations.

In: the settings of `stream.settings.DataSettings`. Out: Lightning's hooks and data loaders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.activation_data import ActivationData, one_or_all
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.normalization import Scaling
from deeplens_lightning.options import takes
from deeplens_lightning.shards.format import UNNAMED
from deeplens_lightning.stream.live_activations import LiveActivations
from deeplens_lightning.stream.loader import ActivationLoader
from deeplens_lightning.stream.placement import placement
from deeplens_lightning.stream.recorded_settings import RECORD, beside, recorded_settings
from deeplens_lightning.stream.resuming import refuse_loading
from deeplens_lightning.stream.serving import Serving
from deeplens_lightning.stream.settings import DataSettings
from deeplens_lightning.stream.validation_set import RowsLoader
from deeplens_lightning.text.packing import Blocks, Packing
from deeplens_lightning.text.sources import IndexedSource
from deeplens_lightning.types import Batch, Provenance

log = logging.getLogger(__name__)


class ActivationDataModule(ActivationData, LightningDataModule):
    """Serve batches of a language model's activations to any LightningModule.

    A batch is a Tensor `(batch_size, d_in)`, float32 unless `buffer_options.dtype` says otherwise, on the device of the
    LightningModule. With several hook points a batch is a dict of such tensors by canonical name. The arguments are the
    fields of `stream.settings.DataSettings`; `help(ActivationDataModule.__init__)` prints them.
    """

    @takes(DataSettings)
    def __init__(self, settings: DataSettings) -> None:
        # `super()` would make `save_hyperparameters` look for the arguments among the local variables of this frame.
        LightningDataModule.__init__(self)
        self.settings = settings
        self.batch_size: int = settings.batch_size  # Lightning's tuner changes it
        self.max_tokens, self.val_rows = settings.max_tokens, settings.val_rows
        self.model_kwargs = settings.model_options.kwargs
        self.serving = Serving(settings)
        # Under one name: Lightning refuses a fit if the LightningModule has another value under a name of this one.
        self.save_hyperparameters({RECORD: recorded_settings(settings)})

    def __str__(self) -> str:
        """The model and the batch size; Lightning's own version would create every loader."""
        name = self.hf_model if isinstance(self.hf_model, str) else type(self.hf_model).__name__
        return f"{type(self).__name__}(hf_model={name!r}, batch_size={self.batch_size})"

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError: a checkpoint holds the position in the data, not the data module."""
        refuse_loading(cls.__name__, checkpoint_path)

    # ---- description of the batches

    @property
    def hf_model(self) -> str | PreTrainedModel | None:
        """The language model, or its name; None if a cache does not record which model it was computed with."""
        return self.serving.source.hf_model

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Canonical names of the hook points, in the order given; empty for bare tensors whose hook point is unknown."""
        return tuple(name for name in self.serving.source.widths if name != UNNAMED)

    @property
    def d_in(self) -> int | dict[str, int]:
        """Width of the rows; a dict by hook point if there are several. Known before any weight is loaded."""
        return one_or_all(self.serving.source.widths)

    @property
    def scaling(self) -> Scaling | dict[str, Scaling]:
        """The normalisation applied to batches; a dict by hook point if there are several hook points.

        It is measured at the first access; every rank measures the same rows.

        Raises:
            NotSetUpError: `setup` was not called.
        """
        return one_or_all(self.serving.measured().scalings)

    @property
    def live(self) -> LiveActivations | None:
        """The opened model and text between `setup` and `teardown`; None with shards."""
        opened = self.serving.opened
        return opened if isinstance(opened, LiveActivations) else None

    @property
    def model(self) -> FrozenModel | None:
        """The frozen model between `setup` and `teardown`; None with shards."""
        return self.live.model if self.live else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, after `setup`; None with shards, and if documents are token ids and there is no tokenizer."""
        return self.live.tokenizer if self.live else None

    @property
    def prepend_bos(self) -> bool | None:
        """Whether segments begin with a BOS token; None for the tokenizer's own behaviour."""
        return self.settings.text_options.prepend_bos

    @property
    def documents(self) -> IndexedSource | None:
        """The documents, indexed by `Provenance.document_index`; None with shards and for a streamed dataset."""
        return self.live.documents if self.live else None

    @property
    def packing(self) -> Packing | None:
        """How the documents were cut into segments, after `setup`; None with shards."""
        return self.live.packing if self.live else None

    def provenance(self, batch: Batch) -> Provenance | None:
        """The document, position and token id of each row of a batch.

        Args:
            batch: the batch object that a training or validation step received, not a copy of it.

        Returns:
            int64 `(batch,)` for each field; None if this data module did not serve the batch.
        """
        return self.serving.seen.provenance(batch)

    def provenance_later(self, batch: Batch) -> Callable[[], Provenance | None]:
        """A function that returns the provenance of a batch, also after the batch is freed; it is read when called."""
        return self.serving.seen.later(batch)

    def heldout_blocks(self, rows: int) -> Iterator[Blocks] | None:
        """Held-out text in the model's input form: chunks of blocks that hold at least `rows` rows in all.

        There are fewer rows if the held-out text has fewer. None with shards, which contain no text.

        Raises:
            NotSetUpError: `setup` was not called.
        """
        return self.serving.activations.heldout_blocks(rows)

    # ---- Lightning's hooks

    @property
    def hparams_initial(self) -> Any:
        """What loggers show: the settings as "data", or "activation_data" beside a module with its own "data"."""
        return beside(super().hparams_initial, self.trainer)

    def prepare_data(self) -> None:
        """Check the settings, and download a hub model that is not on this node yet."""
        self.serving.source.prepare()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Load text, tokenizer and model, or list the shards; nothing is loaded twice."""
        self.serving.open(placement(self.trainer, self.settings))

    def train_dataloader(self) -> ActivationLoader:
        """The training batches. Iterating again continues after the last batch that was trained on."""
        self.hparams[RECORD]["batch_size"] = self.batch_size
        return self.serving.training(self.trainer, self.batch_size, self.max_tokens, type(self).__qualname__)

    def val_dataloader(self) -> RowsLoader | list[Any]:
        """The validation set; an empty list if `val_fraction` or `val_rows` is 0."""
        if not self.settings.val_fraction or not self.val_rows:
            return []
        return self.serving.validation(self.batch_size)

    def test_dataloader(self) -> RowsLoader | list[Any]:
        """The test set, of `val_rows` rows; without `text_options.test_fraction`, the validation set."""
        if not self.settings.text_options.test_fraction:
            rank_zero_info("test uses the validation set: text_options.test_fraction is 0")
            return self.val_dataloader()
        return self.serving.test(self.batch_size) if self.val_rows else []

    def predict_dataloader(self) -> RowsLoader | list[Any]:
        """The validation set; `SparseAutoencoder` predicts the active latents of its rows."""
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the provenance of a batch before it is moved; then call the hook of the LightningModule, if it has one.

        Lightning warns that it would not call that one; here both run.
        """
        if isinstance(batch, Tensor | dict) and self.trainer is not None:
            self.serving.before_move(batch, self.trainer.training)
        module = self._module_with("on_before_batch_transfer")
        return module.on_before_batch_transfer(batch, dataloader_idx) if module is not None else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call the hook of the LightningModule, if it has one; then store the provenance for the batch as it is now."""
        module = self._module_with("on_after_batch_transfer")
        if module is not None:
            batch = module.on_after_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Tensor | dict):
            self.serving.seen.after_move(batch)
        return batch

    def on_exception(self, exception: BaseException) -> None:
        """Free model, buffer, thread and rows, because Lightning does not call `teardown` after an exception.

        An error on the way is logged, and the exception that ended the run is the one that is raised.
        """
        if isinstance(exception, RuntimeError) and self.trainer is not None and self.trainer.world_size > 1:
            log.error(
                "%s may be the consequence of an error on another rank: look for the first error of all ranks",
                exception,
            )
        try:
            self.serving.close(self.batch_size)
        except Exception:
            log.exception("closing the data module after %r failed", exception)

    def teardown(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Free model, buffer, thread and rows."""
        self.serving.close(self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data after the last batch trained on, the fingerprint of the data and the scaling.

        With `write_shards` on several ranks, all of them must call it.
        """
        self.serving.sync()
        state = self.serving.state(self.batch_size)
        return state.to_state() if state is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the normalisation from a checkpoint and, for training, the position in the data.

        Raises:
            ValueError: the checkpoint was taken on other data (the message lists the differences), or by a release
                with another version of the state.
        """
        if state_dict:
            self.serving.resume(state_dict, self.trainer, self.batch_size)

    def _module_with(self, hook: str) -> LightningModule | None:
        """The LightningModule if it has this hook, which Lightning does not call where the data module has it too."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return module if module is not None and is_overridden(hook, module) else None
