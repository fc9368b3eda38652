"""Activations computed on the way: everything between the user's names and an `ActivationStream`.

In: names of a model, hook points and a dataset. Out: streams, held-out rows, statistics, a fingerprint.
What can be wrong is found out in the order of its cost: names, configuration, dataset, tokenizer, weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import HookPoint, resolve
from deeplens_lightning.model.pretrained import load_config, load_tokenizer, locate, max_positions
from deeplens_lightning.normalization import Normalize, Scaling
from deeplens_lightning.options import Isolation
from deeplens_lightning.stream.document_order import Extraction
from deeplens_lightning.stream.live_stream import GROUPED, ActivationStream
from deeplens_lightning.stream.measured_statistics import Statistics, measure
from deeplens_lightning.stream.validation_set import Heldout
from deeplens_lightning.stream.write_through import WriteThroughStream
from deeplens_lightning.text.documents import Documents, Split, special_affixes
from deeplens_lightning.text.packing import Blocks, Packing
from deeplens_lightning.text.sources import Source, open_source
from deeplens_lightning.types import Placement

MAX_BUFFER_ROWS = 262_144
MAX_BUFFER_BYTES = 10**9
BUFFER_SHARE_OF_CUDA = 0.1


@dataclass(kw_only=True)
class LiveActivations:
    """Configuration of live activations, and what was opened of it. `ActivationDataModule` documents the fields."""

    hf_model: str | PreTrainedModel
    layer: int | list[int] | None
    hook: str | list[str]
    dataset_name: str | list[str] | datasets.Dataset | datasets.IterableDataset
    text_column: str
    dataset_split: str
    dataset_kwargs: Mapping[str, Any] | None
    tokenizer_name: str | PreTrainedTokenizerBase | None
    model_kwargs: Mapping[str, Any] | None
    compile_model: bool
    isolation: Isolation | Literal["auto"]
    seq_length: int
    inference_batch_size: int
    seed: int
    buffer_size: int | Literal["auto"]
    shuffle_blocks: bool
    val_fraction: float
    val_rows: int
    exclude_special_tokens: bool
    prepend_bos: bool | None
    drop_first_n: int
    write_shards: str | None = None

    site: Placement | None = field(init=False, default=None)
    model: FrozenModel | None = field(init=False, default=None)
    source: Source | None = field(init=False, default=None)
    tokenizer: PreTrainedTokenizerBase | None = field(init=False, default=None)
    packing: Packing | None = field(init=False, default=None)
    validation: tuple[dict[str, Tensor], Tensor] | None = field(init=False, default=None)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration; no weights are loaded."""
        if isinstance(self.hf_model, str):
            return load_config(self.hf_model, self.model_kwargs)
        return self.hf_model.config

    @cached_property
    def hook_points(self) -> tuple[HookPoint, ...]:
        """What the user named, resolved without weights."""
        return resolve(
            self.hf_model if not isinstance(self.hf_model, str) else self.config, self.layer, self.hook
        )

    @property
    def widths(self) -> dict[str, int]:
        """d_in by hook point."""
        return {point.name: point.d_in for point in self.hook_points}

    @property
    def is_open(self) -> bool:
        """Whether `open` was called, and `close` not since."""
        return self.model is not None

    def prepare(self) -> None:
        """Find mistakes, and download a model of the hub to this node's cache."""
        self.check()
        if isinstance(self.hf_model, str) and not Path(locate(self.hf_model, self.model_kwargs)[0]).exists():
            FrozenModel.load(
                self.hf_model, self.hook_points, device="cpu", model_kwargs=self.model_kwargs
            ).close()

    def check(self) -> None:
        """Find what is wrong without loading weights or text.

        Raises:
            ValueError: an unknown hook point, a layer out of range, or a `seq_length` above the model's positions.
            FileNotFoundError: no such model.
        """
        limit = max_positions(self.config)
        if limit is not None and self.seq_length > limit:
            raise ValueError(
                f"seq_length={self.seq_length} exceeds the model's {limit} positions: give {limit} or less"
            )
        _ = self.hook_points

    def open(self, site: Placement) -> None:
        """Load text, tokenizer and weights; a second call does nothing."""
        if self.model is not None:
            return
        self.site = site
        self.check()
        self._open_text()
        self.model = FrozenModel.load(
            self.hf_model,
            self.hook_points,
            device=site.device,
            model_kwargs=self.model_kwargs,
            compile_model=self.compile_model,
            isolation=self.isolation,
            seq_length=self.seq_length,
        )
        prefix, suffix = special_affixes(self.tokenizer, self.prepend_bos)
        special = self.tokenizer.all_special_ids if self.tokenizer and self.exclude_special_tokens else ()
        self.packing = Packing(
            seq_length=self.seq_length,
            blocks=GROUPED * self.inference_batch_size,
            prefix=prefix,
            suffix=suffix,
            excluded=tuple(sorted(special)),
            drop_first_n=self.drop_first_n,
            alone=self.model.isolation in ("padded", "equal"),
        )

    def stream(
        self, batch_size: int, statistics: Statistics, buffer_rows: int | None
    ) -> ActivationStream | WriteThroughStream:
        """This rank's training batches."""
        site, model, packing = self._opened()
        live = ActivationStream(
            model=model,
            documents=self._documents("train"),
            packing=packing,
            batch_size=batch_size,
            buffer_rows=buffer_rows or self.buffer_rows(batch_size),
            buffer_device=site.batch_device,
            inference_batch_size=self.inference_batch_size,
            seed=self.seed,
            pool=self.shuffle_blocks,
            max_norms=statistics.max_norms,
            show_progress=site.progress,
        )
        if self.write_shards is None:
            return live
        written = {
            "val_fraction": self.val_fraction,
            "val_rows": self.val_rows,
            "max_norms": dict(statistics.max_norms),
        }
        return WriteThroughStream(
            live=live,
            folder=self.write_shards,
            manifest=self.extraction(None, written).manifest(),
            heldout=self.heldout_rows,
            val_fraction=self.val_fraction,
        )

    def measure(self, normalize: Normalize, max_norm_ratio: float | None) -> Statistics:
        """The constants of `statistics.measure`; nothing is run where nothing is wanted."""
        site, model, packing = self._opened()
        if normalize == "none" and max_norm_ratio is None:
            scalings = {point.name: Scaling.identity(point.d_in) for point in self.hook_points}
            return Statistics(scalings=scalings, max_norms={})
        return measure(
            model,
            self._documents("train"),
            packing,
            self.inference_batch_size,
            normalize=normalize,
            max_norm_ratio=max_norm_ratio,
            progress=site.progress,
        )

    def extraction(self, max_rows: int | None, config: Mapping[str, Any] | None = None) -> Extraction:
        """This rank's rows in the order of the documents, held out or not, for a cache."""
        _, model, packing = self._opened()
        return Extraction(
            model=model,
            documents=replace(self._documents("train"), val_fraction=0.0),
            packing=packing,
            inference_batch_size=self.inference_batch_size,
            config={"seed": self.seed, **(config or {})},
            max_rows=max_rows,
        )

    def heldout_rows(self) -> tuple[dict[str, Tensor], Tensor]:
        """This rank's share of the validation set, see `Heldout.compute`; computed once."""
        site, model, _ = self._opened()
        if self.validation is None:
            self.validation = self._heldout(self.val_rows).compute(
                model, self.inference_batch_size, rank=site.rank, ranks=site.ranks, progress=site.progress
            )
        return self.validation

    def heldout_blocks(self, rows: int) -> Iterator[Blocks]:
        """Chunks of blocks with at least so many held-out rows, if there are."""
        return self._heldout(rows).blocks()

    def known_batches(self, batch_size: int) -> int | None:  # noqa: ARG002
        """Batches of an epoch: not known before the text was read."""
        return None

    def buffer_rows(self, batch_size: int) -> int:
        """Slots of the buffer: a multiple of `batch_size`."""
        site, model, _ = self._opened()
        if self.buffer_size != "auto":
            return self.buffer_size // batch_size * batch_size
        row = sum(point.d_in * model.dtypes[point.name].itemsize for point in self.hook_points)
        if site.batch_device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(site.batch_device)
            rows = int(BUFFER_SHARE_OF_CUDA * free) // row
        else:
            rows = min(MAX_BUFFER_ROWS, MAX_BUFFER_BYTES // row)
        return max(rows // batch_size, 4) * batch_size

    def fingerprint(self) -> dict[str, str]:
        """What must not change when a run goes on."""
        _, model, packing = self._opened()
        assert self.source is not None
        return {
            **{f"model {key}": value for key, value in model.identity.items()},
            **self.source.identity,
            "hook points": ", ".join(self.widths),
            "seq_length": str(self.seq_length),
            "inference_batch_size": str(self.inference_batch_size),
            "isolation": model.isolation,
            "special tokens": f"{packing.prefix} {packing.suffix}, excluded {packing.excluded}",
            "drop_first_n": str(self.drop_first_n),
            "shuffle_blocks": str(self.shuffle_blocks),
            "val_fraction": str(self.val_fraction),
            "seed": str(self.seed),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    def close(self) -> None:
        """Let go of the model and the text."""
        if self.model is not None:
            self.model.close()
        self.model = self.source = self.packing = self.validation = None

    def _open_text(self) -> None:
        if self.source is None:
            self.source = open_source(
                self.dataset_name,
                text_column=self.text_column,
                split=self.dataset_split,
                dataset_kwargs=self.dataset_kwargs,
            )
        try:
            self.tokenizer = load_tokenizer(
                self.hf_model, self.tokenizer_name, self.model_kwargs, self.config
            )
        except ValueError:
            if not self._pretokenised():
                raise
            self.tokenizer = None

    def _pretokenised(self) -> bool:
        assert self.source is not None
        first = next(iter(self.source.read(0, 0, seed=0, epoch=0)), None)
        return first is not None and not isinstance(first.row, str)

    def _documents(self, split: Split) -> Documents:
        site, _, _ = self._opened()
        assert self.source is not None
        heldout = split == "heldout"
        return Documents(
            source=self.source,
            tokenizer=self.tokenizer,
            split=split,
            val_fraction=self.val_fraction,
            seed=0 if heldout else self.seed,
            rank=0 if heldout else site.rank,
            ranks=1 if heldout else site.ranks,
        )

    def _heldout(self, rows: int) -> Heldout:
        _, _, packing = self._opened()
        return Heldout(documents=self._documents("heldout"), packing=packing, rows=rows)

    def _opened(self) -> tuple[Placement, FrozenModel, Packing]:
        if self.site is None or self.model is None or self.packing is None:
            raise RuntimeError('the model is not loaded: call setup("fit") on the data module first')
        return self.site, self.model, self.packing
