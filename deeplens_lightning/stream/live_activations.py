"""Serve activations of a loaded model and text: streams, validation rows, statistics, and the identity of the rows.

In: a model, a tokenizer, a dataset and the settings. Out: what the data module serves from, with the same interface as
`cached_source.CachedActivations`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedTokenizerBase

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.normalization import Scaling
from deeplens_lightning.stream import automatic_sizes as sizes
from deeplens_lightning.stream.document_order import Extraction
from deeplens_lightning.stream.live_stream import GROUPED, LiveStream
from deeplens_lightning.stream.measured_statistics import Statistics, measure
from deeplens_lightning.stream.row_identity import named_strings, row_identity
from deeplens_lightning.stream.settings import DataSettings
from deeplens_lightning.stream.validation_set import HeldOutRows, ValidationSet
from deeplens_lightning.stream.write_through import WriteThroughStream
from deeplens_lightning.text.documents import Documents, Split
from deeplens_lightning.text.packing import Blocks, Packing
from deeplens_lightning.text.pipeline import TextStage
from deeplens_lightning.text.sources import IndexedSource, Source
from deeplens_lightning.types import Placement

TEXT_THREADS = 1
"""Threads that tokenise while the model runs on an accelerator; on a CPU they would slow the model down."""
MODEL_BATCHES_AHEAD = 1
"""Model batches that are computed while the rows of the one before are mixed, on CUDA: elsewhere two threads on one
accelerator may crash."""


@dataclass(frozen=True, kw_only=True)
class LiveActivations:
    """Streams, validation rows and statistics from a loaded model and text.

    Attributes:
        given: the settings of the data module, without `shards`.
        placement: rank and devices of this process.
        source: the dataset with all documents.
        tokenizer: None if documents are token ids and there is no tokenizer.
        model: the frozen model.
        packing: the settings of packing.
        inference_batch_size: blocks per model batch: the setting, or what `auto` chose.
    """

    given: DataSettings
    placement: Placement
    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    model: FrozenModel
    packing: Packing
    inference_batch_size: int

    @property
    def widths(self) -> dict[str, int]:
        """Width of the rows, `d_in`, by canonical name of the hook point."""
        return {point.name: point.d_in for point in self.model.hook_points}

    @property
    def documents(self) -> IndexedSource | None:
        """The documents, indexed by `Provenance.document_index`; None for a streamed dataset."""
        return self.source if isinstance(self.source, IndexedSource) else None

    @cached_property
    def heldout(self) -> HeldOutRows:
        """This rank's share of the validation set, computed once and kept."""
        return self._held_out("heldout")

    @cached_property
    def test(self) -> HeldOutRows:
        """This rank's share of the test set, computed once and kept."""
        return self._held_out("test")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the rows: the same list for the fingerprint and for the manifest of a cache."""
        return row_identity(
            self.model,
            self.text("train"),
            inference_batch_size=self.inference_batch_size,
            compiled=self.given.model_options.compile,
        )

    def continued(self, fingerprint: Mapping[str, str]) -> LiveActivations:
        """The same with the model batches of a checkpoint, if their size is `auto`.

        Args:
            fingerprint: fingerprint in the checkpoint.
        """
        given, saved = self.given, fingerprint.get("inference_batch_size")
        size = sizes.model_batch_blocks(
            given.inference_batch_size,
            seq_length=given.seq_length,
            device=self.model.device,
            saved=int(saved) if saved else None,
        )
        if size == self.inference_batch_size:
            return self
        return replace(self, inference_batch_size=size, packing=replace(self.packing, blocks=GROUPED * size))

    def stream(
        self, batch_size: int, statistics: Statistics, saved_rows: int | None
    ) -> LiveStream | WriteThroughStream:
        """Open the stream of this rank's training batches.

        Args:
            batch_size: rows per batch.
            statistics: measured normalisation and norm limits; rows above a norm limit are dropped.
            saved_rows: number of slots of the shuffle buffer in a checkpoint, which are kept; None for a new run.
        """
        given = self.given
        live = LiveStream(
            model=self.model,
            text=self.text("train"),
            batch_size=batch_size,
            buffer_rows=sizes.buffer_rows(
                given.buffer_size,
                row_bytes=sizes.row_bytes(self.model),
                batch_size=batch_size,
                saved=saved_rows,
            ),
            buffer_device=self.placement.batch_device,
            inference_batch_size=self.inference_batch_size,
            seed=given.seed,
            pool=given.buffer_options.shuffle_blocks,
            max_norms=statistics.max_norms,
            ahead=MODEL_BATCHES_AHEAD if self.model.device.type == "cuda" else 0,
            show_progress=self.placement.progress,
        )
        if given.write_shards is None:
            return live
        written = {
            "val_fraction": given.val_fraction,
            "val_rows": self._val_rows,
            "max_norms": dict(statistics.max_norms),
            **given.test_documents,
        }
        return WriteThroughStream(
            live=live,
            placement=self.placement,
            folder=given.write_shards,
            manifest=self.extraction(None, written).manifest(),
            heldout=lambda: self.heldout,
            val_fraction=given.val_fraction,
            options=given.cache_options,
        )

    def measure(self) -> Statistics:
        """Measure normalisation and norm limits; the model does not run if the settings have neither."""
        given = self.given
        if given.normalize == "none" and given.buffer_options.max_norm_ratio is None:
            scalings = {name: Scaling.identity(d_in) for name, d_in in self.widths.items()}
            return Statistics(scalings=scalings, max_norms={})
        return measure(
            self.model,
            self.text("train", alone=True),
            self.inference_batch_size,
            normalize=given.normalize,
            max_norm_ratio=given.buffer_options.max_norm_ratio,
            progress=self.placement.progress,
        )

    def extraction(self, max_rows: int | None, config: Mapping[str, Any] | None = None) -> Extraction:
        """This rank's rows in the order of the documents, held-out ones included, for a cache.

        Args:
            max_rows: stop after this number of rows of this rank; None for all rows.
            config: further JSON-like settings that determine the rows.
        """
        text = self.text("train")
        given = self.given
        return Extraction(
            model=self.model,
            text=replace(text, documents=replace(text.documents, val_fraction=0.0, test_fraction=0.0)),
            inference_batch_size=self.inference_batch_size,
            identity=self.identity,
            config={"seed": given.seed, **(config or {})},
            max_rows=max_rows,
        )

    def heldout_blocks(self, rows: int) -> Iterator[Blocks]:
        """Iterate over chunks of held-out blocks until they hold `rows` rows, or until the held-out text ends."""
        return ValidationSet(text=self.text("heldout"), rows=rows).blocks()

    def known_batches(self, batch_size: int) -> int | None:  # noqa: ARG002
        """None: the number of batches of an epoch is not known before the text was read."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """What must be the same when a run continues from a checkpoint: name to value."""
        given = self.given
        return {
            **named_strings(self.identity),
            "hook points": ", ".join(self.widths),
            "shuffle_blocks": str(given.buffer_options.shuffle_blocks),
            "buffer_size": str(given.buffer_size),
            "val_fraction": str(given.val_fraction),
            **{name: str(value) for name, value in given.test_documents.items()},
            "seed": str(given.seed),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    def text(self, split: Split, *, alone: bool = False) -> TextStage:
        """The text of a split: for `train` this rank's share, for `heldout` and `test` all of it on every rank.

        Args:
            split: the split.
            alone: all of the text for `train` as well, in the order of a single rank.
        """
        given, heldout = self.given, split != "train"
        alone = alone or heldout
        documents = Documents(
            source=self.source,
            split=split,
            val_fraction=given.val_fraction,
            test_fraction=given.text_options.test_fraction,
            seed=0 if heldout else given.seed,
            rank=0 if alone else self.placement.rank,
            ranks=1 if alone else self.placement.ranks,
        )
        threads = 0 if self.placement.device.type == "cpu" else TEXT_THREADS
        return TextStage(documents=documents, tokenizer=self.tokenizer, packing=self.packing, threads=threads)

    def close(self) -> None:
        """Free the model."""
        self.model.close()

    def _held_out(self, split: Split) -> HeldOutRows:
        chosen = ValidationSet(text=self.text(split), rows=self._val_rows)
        return chosen.compute(self.model, self.inference_batch_size, self.placement)

    @cached_property
    def _val_rows(self) -> int:
        given = self.given
        return sizes.validation_rows(
            given.val_rows, max_bytes=given.buffer_options.val_bytes, row_bytes=sizes.row_bytes(self.model)
        )
