"""`FromHuggingFace`: extract the activations of a dataset's first samples as one tensor, as in DeepLens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.devices import device_of
from deeplens_lightning.disk.files import write_whole
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
        | Sequence[str]
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
                parquet files, a `datasets` object, a list of texts, or `demo:docs`. Hub datasets are streamed.
            num_samples: number of texts to read. Empty texts count, and give no rows.
            seq_length: maximum number of tokens of a text; longer texts are cut.
            inference_batch_size: number of sequences in a model batch.
            device: `cpu`, `cuda`, `mps`, or `auto` for the first of CUDA, MPS and the CPU that is there.
            save_features: whether `extract_features` saves its result in `saved_features/`.
            hook: kind of hook point; `mlp_act`, the output of the MLP's activation function, is what DeepLens reads.
            text_column: name of the dataset's column of texts.
            tokenizer: name of a tokenizer, or a tokenizer; default the model's own.
            model_kwargs: arguments of `from_pretrained`.

        Raises:
            ValueError: `layer`, `hook` or `text_column` is not there; `seq_length` exceeds the model's positions;
                `num_samples` or `inference_batch_size` is below 1.
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
            `(total_tokens, hidden_dim)` on the CPU in the model's dtype: the tokens of the texts in order.

        Raises:
            ValueError: all samples are empty.
        """
        documents = list(self._documents())
        total = sum(len(document.tokens) for document in documents)
        extra = sum(map(len, special_affixes(self.tokenizer, None)))
        total += extra * len(documents)
        if not total:
            raise ValueError(
                f"the first {self.num_samples} samples hold no text; raise num_samples or choose another dataset_name"
            )
        name = self.hook_point.name
        features = torch.empty(total, self.hook_point.d_in, dtype=self.model.dtypes[name])
        filled = 0
        for rows in self._batches(documents, total):
            features[filled : filled + len(rows)] = rows
            filled += len(rows)
        if self.save_features:
            print(f"Features saved to {self._save(features)}")
        return features

    def extract_features_batched(self) -> Iterator[Tensor]:
        """Extract the activations in pieces, for more rows than fit in memory; nothing is saved.

        Yields:
            `(tokens, hidden_dim)` on the CPU in the model's dtype. Concatenated in order, the pieces are the tensor
            that `extract_features` returns.
        """
        yield from self._batches(self._documents(), None)

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

    def _save(self, features: Tensor) -> Path:
        """Save under the file name that DeepLens uses."""
        path = Path("saved_features") / f"features_layer_{self.layer}_{len(features)}.pt"
        write_whole(path, lambda file: torch.save(features, file))
        return path


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
