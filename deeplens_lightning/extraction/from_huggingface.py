"""`FromHuggingFace`: extract the activations of a dataset's first samples as one tensor, as in DeepLens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import Any

import datasets
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.devices import device_of
from deeplens_lightning.extraction.saved_features import Room, gigabytes, save, save_pieces
from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.model.hook_points import resolve
from deeplens_lightning.model.pretrained import load_config, load_tokenizer, max_positions
from deeplens_lightning.model.rows import run_model
from deeplens_lightning.model.wrappers import unwrapped
from deeplens_lightning.text.documents import document_hash
from deeplens_lightning.text.packing import Packing, TokenizedDocument, model_batches
from deeplens_lightning.text.pipeline import GROUP
from deeplens_lightning.text.sources import IndexedSource, Row, Source, StreamedSource, open_source
from deeplens_lightning.text.tokens import special_affixes, tokenize
from deeplens_lightning.types import DealingState, TextPosition


class FromHuggingFace:
    """Extract the activations of the first `num_samples` texts of a dataset, one row per token.

    The model sees each text alone, up to `seq_length` tokens. Special tokens that the tokenizer adds give rows, padding
    does not.

    Attributes:
        hook_point: where activations are read.
        layer: its layer, counted from 0.
        device: where the model runs.
        tokenizer: the tokenizer of the texts.
    """

    def __init__(
        self,
        hf_model: str | PreTrainedModel = "gpt2",
        layer: int = 6,
        dataset_name: str
        | PathLike[str]
        | Sequence[str]
        | Sequence[PathLike[str]]
        | datasets.Dataset
        | datasets.IterableDataset = "HuggingFaceFW/fineweb",
        num_samples: int = 25_000,
        seq_length: int = 128,
        inference_batch_size: int = 16,
        device: str = "auto",
        save_features: bool = True,
        *,
        hook: str = "mlp_act",
        text_column: str = "text",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the hook point and open the dataset; the model is loaded when features are first extracted.

        Args:
            hf_model: hub id, local folder, GGUF file, `demo:lm` or a loaded model.
            layer: the layer to read, from 0; negative layers count from the end.
            dataset_name: hub id (`wikitext/wikitext-103-v1` includes a configuration), path or glob of txt, jsonl or
                parquet files or a list of them, a `datasets` object, a list of texts, or `demo:docs`. Hub datasets are
                streamed.
            num_samples: number of texts to read. Empty texts count, and give no rows.
            seq_length: maximum number of tokens of a text; longer texts are cut.
            inference_batch_size: number of sequences in a model batch.
            device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the first of CUDA, MPS and the CPU that is there.
            save_features: whether `extract_features` saves its result in `saved_features/`, as
                `features_layer_<layer>_<rows>.pt`; for another hook point than `mlp_act` the name has that of the
                hook point. A file with other content is kept, and the new name then ends in a number.
            hook: a kind of hook point (`mlp_in`, `mlp_act`, `mlp_post`, `mlp_out`, `attn_out`, `attn_z`, `resid_pre`,
                `resid_mid`, `resid_post`, `final_norm`), a canonical name (`layers.3.mlp_out`), a TransformerLens name
                (`blocks.3.hook_mlp_out`) or a module path (`transformer.h.3.mlp`). `mlp_act`, the output of the MLP's
                activation function, is what DeepLens reads.
            text_column: name of the dataset's column of texts.
            tokenizer: hub id, folder or a loaded tokenizer; default the model's own.
            model_kwargs: arguments of `from_pretrained`.

        Raises:
            ValueError: `layer`, `hook`, `text_column` or `device` is not there; several hook points are named;
                `seq_length` exceeds the model's positions; `num_samples` or `inference_batch_size` is below 1.
            FileNotFoundError: there is no such model or dataset.
        """
        if num_samples < 1 or inference_batch_size < 1:
            raise ValueError(
                "num_samples and inference_batch_size must be at least 1, "
                f"got {num_samples} and {inference_batch_size}"
            )
        self.hf_model, self.model_kwargs = hf_model, model_kwargs
        if isinstance(hf_model, str):
            config = load_config(hf_model, model_kwargs)
            points = resolve(config, layer, hook)
        else:
            config, points = unwrapped(hf_model).config, resolve(hf_model, layer, hook)
        if len(points) > 1:
            raise ValueError(
                f"FromHuggingFace reads one hook point, but {', '.join(point.name for point in points)} were named; make "
                "one object for each, or write all of them with `deeplens-lightning extract`"
            )
        [self.hook_point] = points
        limit = max_positions(config)
        if limit is not None and seq_length > limit:
            raise ValueError(
                f"seq_length={seq_length} exceeds the model's {limit} positions; give at most {limit}"
            )
        self.layer = layer if self.hook_point.layer is None else self.hook_point.layer
        self.num_samples = num_samples
        self.seq_length = seq_length
        self.inference_batch_size = inference_batch_size
        self.device = device_of(device)
        self.save_features = save_features
        self.tokenizer = load_tokenizer(hf_model, tokenizer, model_kwargs, config)
        self._source = open_source(dataset_name, text_column=text_column)
        self._model: FrozenModel | None = None

    @property
    def model(self) -> FrozenModel:
        """The frozen model up to the hook point; loaded on first use."""
        if self._model is None:
            self._model = FrozenModel.load(
                self.hf_model,
                [self.hook_point],
                device=self.device,
                model_kwargs=self.model_kwargs,
                seq_length=self.seq_length,
            )
        return self._model

    def extract_features(self) -> Tensor:
        """Extract all activations as one tensor; with `save_features`, save it and print the path.

        Returns:
            `(total_tokens, hidden_dim)` on the CPU in the model's dtype: the tokens of the texts in order. With
            `save_features`, a tensor larger than half of this machine's memory is mapped from its file.

        Raises:
            ValueError: all samples are empty, or the tensor would be too large for the memory, or with `save_features`
                for the disk; before the model reads a text.
        """
        point, room = self.hook_point, Room(self.save_features)
        row_bytes = point.d_in * self.model.dtypes[point.name].itemsize
        documents, total = self._fitting(room, row_bytes)
        if total * row_bytes > room.memory:
            print(
                f"The features take {gigabytes(total * row_bytes)}, more than half of this machine's memory: they are "
                "written to a file and mapped from it"
            )
            path, features = save_pieces(self._batches(documents, total), total, point)
        else:
            features, filled = torch.empty(total, point.d_in, dtype=self.model.dtypes[point.name]), 0
            for rows in self._batches(documents, total):
                features[filled : filled + len(rows)] = rows
                filled += len(rows)
            if not self.save_features:
                return features
            path = save(features, point)
        print(f"Features saved to {path}")
        return features

    def extract_features_batched(self) -> Iterator[Tensor]:
        """Extract the activations in pieces, for more rows than fit in memory; nothing is saved.

        Yields:
            `(tokens, hidden_dim)` on the CPU in the model's dtype. Concatenated in order, the pieces are the tensor
            that `extract_features` returns.
        """
        yield from self._batches(self._documents(), None)

    def _fitting(self, room: Room, row_bytes: int) -> tuple[list[TokenizedDocument], int]:
        """All documents and the number of their rows.

        Raises:
            ValueError: there are none, or their rows take more room than there is; raised as soon as that is certain.
        """
        extra = sum(map(len, special_affixes(self.tokenizer, None)))
        documents, total = [], 0
        for document in self._documents():
            documents.append(document)
            total += len(document.tokens) + extra
            if total * row_bytes > room.largest:
                samples = self.num_samples
                if isinstance(self._source, IndexedSource):
                    samples = min(samples, len(self._source))
                raise room.too_large(total * row_bytes * samples / (document.index + 1), samples)
        if not total:
            raise ValueError(
                f"the first {self.num_samples} samples hold no text; raise num_samples or choose another dataset_name"
            )
        return documents, total

    def _documents(self) -> Iterator[TokenizedDocument]:
        """Tokenise the samples that hold text, in the dataset's order; each is cut to one segment."""
        prefix, suffix = special_affixes(self.tokenizer, None)
        room = self.seq_length - len(prefix) - len(suffix)
        samples = islice(enumerate(_texts(self._source)), self.num_samples)
        dealing = DealingState(ranks=1, by_shards=False, loads=(0,))  # one rank reads everything, once
        while group := list(islice(samples, GROUP)):
            rows = [row for _, row in group]
            for (index, row), tokens in zip(group, tokenize(rows, self.tokenizer), strict=True):
                if len(tokens):
                    position = TextPosition(at=(0, index), reader=None, dealing=dealing)
                    yield TokenizedDocument(
                        position=position, index=index, hash=document_hash(row), tokens=tokens[:room]
                    )

    def _batches(self, documents: Iterable[TokenizedDocument], total: int | None) -> Iterator[Tensor]:
        """Run the model on chunks of documents; yield the rows of a chunk in the documents' order."""
        model, (prefix, suffix) = self.model, special_affixes(self.tokenizer, None)
        packing = Packing(
            seq_length=self.seq_length,
            blocks=self.inference_batch_size,
            prefix=prefix,
            suffix=suffix,
            alone=model.isolation != "packed",
        )
        with tqdm(
            total=total, desc=f"extracting {self.hook_point.name}", unit="token", unit_scale=True
        ) as bar:
            for chunk in packing.chunks(documents):
                pieces, places = [], []
                for index in model_batches(chunk.blocks, self.inference_batch_size, model.isolation):
                    blocks = chunk.blocks.select(index)
                    batch = run_model(model, blocks)
                    x = batch.activations[self.hook_point.name]
                    place = batch.provenance[:, 1] * self.seq_length + blocks.positions[blocks.keep]
                    in_order = place.argsort()
                    pieces.append(x.index_select(0, batch.kept[in_order].to(x.device)).cpu())
                    places.append(place[in_order])
                    bar.update(len(batch.kept))
                yield pieces[0] if len(pieces) == 1 else torch.cat(pieces)[torch.cat(places).argsort()]


def _texts(source: Source) -> Iterator[Row]:
    """The values of the dataset's text column, in the dataset's order."""
    if isinstance(source, IndexedSource):
        return iter(source.rows)
    if isinstance(source, StreamedSource):
        return (row[source.column] for row in source.dataset)
    raise TypeError(
        f"FromHuggingFace reads a dataset in its own order, which {type(source).__name__} does not have; "
        "give a dataset on the hub, files or a list of texts"
    )
