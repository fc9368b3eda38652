"""`ActivationDataModule`: choose where activations come from, hand out loaders, own the state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import datasets
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.activation_data import ActivationData
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.normalization import Normalize, Scaling, check_normalize, scalings_state
from deeplens_lightning.options import CACHE_BYTES, Isolation, Shuffle
from deeplens_lightning.stream.cached_source import CachedActivations
from deeplens_lightning.stream.checkpoint import (
    STATE_VERSION,
    check_fingerprint,
    check_version,
    lost_in_accumulation,
    served_table,
)
from deeplens_lightning.stream.live_source import LiveActivations
from deeplens_lightning.stream.loader import ActivationLoader, finish, key_of
from deeplens_lightning.stream.measured_statistics import Statistics
from deeplens_lightning.stream.validation_set import RowsLoader
from deeplens_lightning.stream.write_through import WriteThroughStream
from deeplens_lightning.text.packing import Blocks, Packing
from deeplens_lightning.text.sources import IndexedSource
from deeplens_lightning.types import Batch, Placement, Provenance, device_of

CUDA_PREFETCH = 2
T = TypeVar("T")


class ActivationDataModule(ActivationData, LightningDataModule):
    """Batches of a language model's activations, for any LightningModule that wants them.

    A batch is a Tensor `(batch_size, d_in)`, or for several hook points a dict of them by canonical name, on the
    device of the LightningModule.

    Args:
        hf_model: hub id, folder, `.gguf` file, `demo:lm` (embedded), or a loaded model, which is left as it is.
        layer: one or several, counted from 0; negative ones from the end.
        hook: kind of hook point, canonical name, TransformerLens name or module path; one or several.
        dataset_name: hub id, path or glob of txt, jsonl or parquet files, a `datasets` object, a list of texts, or
            `demo:docs` (embedded).
        text_column: of texts or token ids.
        dataset_split: of a dataset on the hub.
        dataset_kwargs: for `datasets.load_dataset`.
        tokenizer: default the model's own.
        model_kwargs: for `from_pretrained`: dtype, device_map, quantization_config, attn_implementation, revision, …
        compile_model: `torch.compile` the parts of the model between hook points.
        isolation: how segments are kept apart; `auto` probes the model. See `model.Isolation`.
        isolate_documents: False lets the segments of a block see each other.
        seq_length: the most tokens of a segment, and the length of a block.
        inference_batch_size: blocks a model batch.
        batch_size: rows a batch.
        buffer_size: rows being mixed; `auto` is at most 262 144 rows and 1 GB, on CUDA a tenth of free memory.
        buffer_device: default where the LightningModule is.
        shuffle_blocks: mix blocks before the model, too.
        prefetch: batches computed ahead in a thread; default 2 on CUDA, else 0.
        dtype: of served batches; `auto` leaves the activation dtype.
        max_tokens: rows that one Trainer epoch takes, over all ranks; the text goes on across epochs.
        val_fraction: share of documents held out, by the hash of their text.
        val_rows: held-out rows of the validation set.
        normalize: see `scaling.Normalize`.
        max_norm_ratio: drop rows whose norm is above so many times the median norm (attention sinks).
        exclude_special_tokens: special tokens are context, but no rows.
        prepend_bos: put a BOS before every segment; default what the tokenizer does.
        drop_first_n: leave out so many tokens at the start of every segment.
        shards: folders that `extract` wrote, bare `.pt` tensors as DeepLens saves them, globs, or fsspec URLs. Batches
            come from there; no model and no text are loaded, and what describes them is not used.
        write_shards: folder or fsspec URL of a cache that the first epoch writes while it trains; later epochs, and
            later runs with the same settings, read it.
        shuffle: of shards: `global`, `window` (for caches larger than memory), `none`, or `auto` by size.
        checksums: check every shard when it is first read.
        cache_dir: for copies of remote shards; default a temporary folder.
        cache_bytes: bound on those copies.
        seed: of the order of documents and of all shuffles.
        device: of the model where there is no Trainer; `auto` is cuda, then mps, then cpu.
        resume_anyway: go on from a checkpoint although the configuration differs.

    Raises:
        ValueError: settings that cannot work together.
    """

    def __init__(
        self,
        hf_model: str | PreTrainedModel = "demo:lm",
        layer: int | list[int] | None = 3,
        hook: str | list[str] = "mlp_act",
        dataset_name: str | list[str] | datasets.Dataset | datasets.IterableDataset = "demo:docs",
        *,
        shards: str | list[str] | None = None,
        write_shards: str | None = None,
        text_column: str = "text",
        dataset_split: str = "train",
        dataset_kwargs: dict[str, Any] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        model_kwargs: dict[str, Any] | None = None,
        compile_model: bool = False,
        isolation: Isolation | Literal["auto"] = "auto",
        isolate_documents: bool = True,
        seq_length: int = 128,
        inference_batch_size: int = 16,
        batch_size: int = 4096,
        buffer_size: int | Literal["auto"] = "auto",
        buffer_device: str | None = None,
        shuffle_blocks: bool = True,
        prefetch: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
        max_tokens: int | None = None,
        val_fraction: float = 0.05,
        val_rows: int = 65_536,
        normalize: Normalize = "none",
        max_norm_ratio: float | None = None,
        exclude_special_tokens: bool = True,
        prepend_bos: bool | None = None,
        drop_first_n: int = 0,
        shuffle: Shuffle = "auto",
        checksums: bool = False,
        cache_dir: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        seed: int = 0,
        device: str = "auto",
        resume_anyway: bool = False,
    ) -> None:
        super().__init__()
        check_normalize(normalize)
        _check_sizes(batch_size, buffer_size, inference_batch_size, seq_length, max_tokens, val_fraction)
        self.hf_model, self.model_kwargs = hf_model, model_kwargs
        self.batch_size, self.max_tokens, self.val_rows, self.normalize = (
            batch_size,
            max_tokens,
            val_rows,
            normalize,
        )
        self.source: LiveActivations | CachedActivations
        if shards is not None:
            self.source = CachedActivations(
                shards=shards,
                shuffle=shuffle,
                checksums=checksums,
                cache_dir=cache_dir,
                cache_bytes=cache_bytes,
                seed=seed,
                val_fraction=val_fraction,
                val_rows=val_rows,
            )
        else:
            self.source = LiveActivations(
                hf_model=hf_model,
                layer=layer,
                hook=hook,
                dataset_name=dataset_name,
                text_column=text_column,
                dataset_split=dataset_split,
                dataset_kwargs=dataset_kwargs,
                tokenizer_name=tokenizer,
                model_kwargs=model_kwargs,
                compile_model=compile_model,
                isolation=isolation if isolate_documents else "none",
                seq_length=seq_length,
                inference_batch_size=inference_batch_size,
                seed=seed,
                buffer_size=buffer_size,
                shuffle_blocks=shuffle_blocks,
                val_fraction=val_fraction,
                val_rows=val_rows,
                exclude_special_tokens=exclude_special_tokens,
                prepend_bos=prepend_bos,
                drop_first_n=drop_first_n,
                write_shards=write_shards,
            )
        self._buffer_device, self._device, self._prefetch = buffer_device, device, prefetch
        self._dtype = None if dtype == "auto" else getattr(torch, dtype)
        self._max_norm_ratio, self._resume_anyway = max_norm_ratio, resume_anyway
        self._statistics: Statistics | None = None
        self._state: dict[str, Any] = {}
        self._train: ActivationLoader | None = None
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._statistics_loaded = False
        self._ready_at_start = self._ready_seen = 0

    def __getstate__(self) -> dict[str, Any]:
        """A strategy that spawns ranks sends each a copy; what batches were seen is this process's own."""
        return {**vars(self), "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _seen=WeakIdKeyDictionary())

    def __str__(self) -> str:
        """What it was made for; Lightning's own would go through every loader."""
        name = self.hf_model if isinstance(self.hf_model, str) else type(self.hf_model).__name__
        return f"{type(self).__name__}(hf_model={name!r}, batch_size={self.batch_size})"

    # ---- what it serves

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Canonical names of the hook points, in the order given."""
        return tuple(self.source.widths)

    @property
    def d_in(self) -> int | dict[str, int]:
        """Width of the rows; by hook point if there are several. Known before any weight is loaded."""
        return _one(self.source.widths)

    @property
    def scaling(self) -> Scaling | dict[str, Scaling]:
        """The normalisation of served batches; by hook point if there are several. All ranks must ask together."""
        return _one(self._measured().scalings)

    @property
    def model(self) -> FrozenModel | None:
        """The frozen model between `setup` and `teardown`."""
        return self.source.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, after `setup`; None for token ids without one."""
        return self.source.tokenizer

    @property
    def prepend_bos(self) -> bool | None:
        """Whether segments begin with a BOS; None for what the tokenizer does."""
        return self.source.prepend_bos if isinstance(self.source, LiveActivations) else None

    @property
    def documents(self) -> IndexedSource | None:
        """The documents that provenance counts, where they can be read again."""
        source = self.source.source if isinstance(self.source, LiveActivations) else None
        return source if isinstance(source, IndexedSource) else None

    @property
    def packing(self) -> Packing | None:
        """How the documents were cut into segments, after `setup`."""
        return self.source.packing if isinstance(self.source, LiveActivations) else None

    def provenance(self, batch: Batch) -> Provenance | None:
        """Where the rows of a batch came from, for one that a step was given and that is still alive."""
        table = self._seen.get(key_of(batch))
        return Provenance(*table.unbind(1)) if table is not None else None

    def heldout_blocks(self, rows: int) -> Iterator[Blocks] | None:
        """Held-out text as the model sees it: chunks of blocks with at least so many rows, if there are.

        None with shards, which hold no text.
        """
        return self.source.heldout_blocks(rows)

    # ---- Lightning's hooks

    def prepare_data(self) -> None:
        """Find mistakes and download what is not on this node."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Load text, tokenizer and model, unless they are. Training begins at the beginning, or at a checkpoint."""
        if not self.source.is_open:
            self._state = {}
            if self._statistics_loaded:
                self._statistics, self._statistics_loaded = None, False
        self.source.open(self._site())

    def train_dataloader(self) -> ActivationLoader:
        """Training batches, which go on where they stopped."""
        if self._train is not None and self._train.batch_size == self.batch_size and not self._rewound():
            return self._train
        site = self._site()
        self._expect_state()
        statistics = self._measured()
        stream = self.source.stream(self.batch_size, statistics, self._state.get("buffer_rows"))
        budget = self.max_tokens // (self.batch_size * site.ranks) if self.max_tokens else None
        cuda = site.batch_device.type == "cuda"
        prefetch = (CUDA_PREFETCH if cuda else 0) if self._prefetch is None else self._prefetch
        if self._train is not None:
            self._train.close()
            self._train.stream.close()
        loader = ActivationLoader(
            stream,
            scalings=statistics.scalings,
            dtype=self._dtype,
            batch_size=self.batch_size,
            batches_per_epoch=budget,
            known_length=self.source.known_batches(self.batch_size),
            prefetch=prefetch,
            device=site.batch_device,
            unprocessed=self._unprocessed,
            seen=self._remember,
            warn=rank_zero_warn,
            endless=self._trainer_counts,
            overfit=bool(self.trainer is not None and self.trainer.overfit_batches),  # type: ignore[attr-defined]
        )
        self._train = loader
        if self._state:
            self._go_on(loader, site)
        return loader

    def val_dataloader(self) -> RowsLoader | list[Any]:
        """The validation set; nothing where no document is held out."""
        if not self.source.val_fraction or not self.val_rows:
            return []
        return RowsLoader(self.source.heldout_rows, self.batch_size, self._finish, self._remember)

    def test_dataloader(self) -> RowsLoader | list[Any]:
        """The validation set again: nothing else is held out."""
        return self.val_dataloader()

    def predict_dataloader(self) -> RowsLoader | list[Any]:
        """The validation set again."""
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ARG002
        """Let a batch that the precision plugin has cast keep its provenance."""
        if self._train is not None and self.trainer is not None and self.trainer.training:
            self._train.recognise(batch)
        return batch

    def on_exception(self, exception: BaseException) -> None:  # noqa: ARG002
        """Let go of everything: `teardown` does not come after an exception."""
        self._close()

    def teardown(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Let go of model, buffer, thread and rows."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch trained on, and what it is a stream of."""
        position = self._train.position() if self._train is not None else None
        if self._train is not None and isinstance(self._train.stream, WriteThroughStream):
            self._train.stream.sync()
        if not self.source.is_open or (position is None and self._state):
            return self._state
        statistics = self._statistics
        return {
            "version": STATE_VERSION,
            "fingerprint": self._fingerprint(),
            "position": position,
            "buffer_rows": getattr(self._train.stream, "buffer_rows", None)
            if self._train is not None
            else None,
            "scalings": scalings_state(statistics.scalings) if statistics else {},
            "max_norms": dict(statistics.max_norms) if statistics else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the normalisation from a checkpoint and, where it is for training, the place in the data.

        Raises:
            ValueError: the checkpoint was taken on other data, which is named, or by another version.
        """
        if not state_dict:
            return
        check_version(state_dict)
        fitting = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if fitting and not self._resume_anyway:
            unused = (
                set() if state_dict["position"] else {"batch_size"}
            )  # nothing was served: tuners change it
            check_fingerprint(state_dict["fingerprint"], self._fingerprint(), unused)
        if state_dict["scalings"]:
            scalings = {name: Scaling.from_state_dict(x) for name, x in state_dict["scalings"].items()}
            self._statistics = Statistics(scalings=scalings, max_norms=dict(state_dict["max_norms"]))
            self._statistics_loaded = True
        if fitting:
            self._state = state_dict
            if self._train is not None:
                self._train.close()
                self._train.stream.close()
                self._train = None

    # ---- inside

    def _go_on(self, loader: ActivationLoader, site: Placement) -> None:
        """Stand where the checkpoint was taken, whatever the number of ranks is now."""
        position = self._state["position"]
        if position is None:
            return
        if self.trainer is not None and (lost := lost_in_accumulation(self.trainer)):
            rank_zero_warn(lost)
        table = served_table(position)
        if len(table) == site.ranks:
            where, step, _ = table[site.rank]
            loader.go_to(where, step, position)
            return
        where, again = loader.stream.rescaled(table)
        in_epoch = position["in_epoch"] * len(table) // site.ranks
        loader.go_to(where, 0, {**position, "epoch_batches": 0, "in_epoch": in_epoch})
        rank_zero_info(
            f"going on with {site.ranks} rank(s) where {len(table)} stopped: {again} rows are served again"
        )

    def _expect_state(self) -> None:
        trainer = self.trainer
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if fitting and trainer.ckpt_path and not self._state and not self._resume_anyway:  # type: ignore[union-attr]
            raise ValueError(
                f"{trainer.ckpt_path} holds no state of {type(self).__qualname__}, so the data would begin anew: was the "  # type: ignore[union-attr]
                "data module renamed or subclassed? Load the model alone with load_from_checkpoint, or give "
                "resume_anyway=True"
            )

    def _site(self) -> Placement:
        trainer = self.trainer
        if trainer is None:
            device = device_of(self._device)
            rank, ranks, progress = 0, 1, True
        else:
            device = trainer.strategy.root_device
            replicas = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
            rank, ranks = replicas.get("rank", 0), replicas.get("num_replicas", 1)
            progress = rank == 0 and trainer.progress_bar_callback is not None
        buffer_device = torch.device(self._buffer_device) if self._buffer_device else device
        return Placement(rank=rank, ranks=ranks, device=device, batch_device=buffer_device, progress=progress)

    def _measured(self) -> Statistics:
        if self._statistics is None:
            self._statistics = self.source.measure(self.normalize, self._max_norm_ratio)
        return self._statistics

    def _fingerprint(self) -> dict[str, str]:
        return self.source.fingerprint() | {
            "batch_size": str(self.batch_size),
            "normalize": self.normalize,
            "max_norm_ratio": str(self._max_norm_ratio),
        }

    def _finish(self, rows: dict[str, Tensor]) -> Batch:
        return finish(rows, self._measured().scalings, self._dtype)

    def _remember(self, batch: Batch, provenance: Tensor) -> None:
        self._seen[key_of(batch)] = provenance

    def _unprocessed(self) -> int:
        """Batches that were served and not trained on: read ahead, or thrown away by the Trainer."""
        loader = self._train
        if loader is None or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        if loader.served == 0:
            self._ready_at_start = progress.total.ready
        self._ready_seen = progress.total.ready
        begun: int = progress.current.ready - progress.current.processed
        done: int = progress.total.ready - self._ready_at_start - begun
        return loader.served - done

    def _rewound(self) -> bool:
        """Whether the Trainer went back, as tuners do after their trials."""
        if self.trainer is None or self._train is None or not self._train.served:
            return False
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready < self._ready_seen

    def _trainer_counts(self) -> bool:
        """Whether the Trainer knows how many batches an epoch of its own has, and so ends it itself."""
        trainer = self.trainer
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        return fitting and trainer.fit_loop.max_batches != float("inf")  # type: ignore[union-attr]

    def _close(self) -> None:
        self._state = self.state_dict()
        if self._train is not None:
            self._train.close()
            self._train.stream.close()
        self._train = None
        self.source.close()


def _one(values: Mapping[str, T]) -> T | dict[str, T]:
    return next(iter(values.values())) if len(values) == 1 else dict(values)


def _check_sizes(
    batch_size: int,
    buffer_size: int | str,
    inference_batch_size: int,
    seq_length: int,
    max_tokens: int | None,
    val_fraction: float,
) -> None:
    counts = {
        "batch_size": batch_size, "inference_batch_size": inference_batch_size, "seq_length": seq_length,
    }  # fmt: skip
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not isinstance(buffer_size, int):
        if buffer_size != "auto":
            raise ValueError(f'buffer_size={buffer_size!r} must be a number of rows or "auto"')
    elif buffer_size < batch_size:
        raise ValueError(
            f"buffer_size={buffer_size} is below batch_size={batch_size}: rows are mixed in the buffer, so give several "
            f'times the batch, {16 * batch_size} say, or "auto"'
        )
    if max_tokens is not None and max_tokens < batch_size:
        raise ValueError(
            f"max_tokens={max_tokens} is below batch_size={batch_size}: an epoch would have no batch"
        )
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1")
