"""`DataSettings`: everything that `ActivationDataModule` can be told, checked before anything is loaded.

In: what the user typed. Out: one frozen object that the live and the cached source read.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.normalization import Normalize, check_normalize
from deeplens_lightning.options import BufferOptions, CacheOptions, ModelOptions, TextOptions, changed

DEMO_LM = "demo:lm"
DEFAULT_LAYER, DEFAULT_HOOK = 3, "mlp_act"

_ONLY_LIVE = (
    "dataset_name", "text_column", "dataset_split", "write_shards", "tokenizer", "seq_length",
    "inference_batch_size", "buffer_size", "exclude_special_tokens", "text_options",
)  # fmt: skip
"""Settings that rows from shards do not use: they are as they were written."""


@dataclass(frozen=True, eq=False)
class DataSettings:
    """Settings of `ActivationDataModule`.

    Args:
        hf_model: hub id, folder, `.gguf` file, `demo:lm` (embedded, the default), or a loaded model, which is left
            as it is. With `shards`, what the rows were computed with; default what the cache says.
        layer: one or several, counted from 0, negative ones from the end; default 3, and with `shards` all in the
            cache.
        hook: kind of hook point, canonical name, TransformerLens name or module path, one or several; default
            `mlp_act`, and with `shards` all in the cache. For bare tensors `layer` and `hook` name what they hold.
        dataset_name: hub id, path or glob of txt, jsonl or parquet files, a `datasets` object, a list of texts, or
            `demo:docs` (embedded).
        shards: folders that `extract` wrote, bare `.pt` tensors as DeepLens saves them, globs, or fsspec URLs.
            Batches come from there; no model and no text are loaded.
        write_shards: folder or fsspec URL of a cache that the first epoch writes while it trains; later epochs, and
            later runs with the same settings, read it.
        text_column: of texts or token ids.
        dataset_split: of a dataset on the hub.
        tokenizer: default the model's own.
        seq_length: the most tokens of a segment, and the length of a block.
        inference_batch_size: blocks a model batch.
        batch_size: rows a batch.
        buffer_size: rows being mixed; `auto` is at most 262 144 rows and 1 GB, on CUDA a tenth of free memory.
        prefetch: batches computed ahead in a thread; default 2 on CUDA, else 0.
        max_tokens: rows that one Trainer epoch takes, over all ranks; the text goes on across epochs.
        val_fraction: share of documents held out, by the hash of their text.
        val_rows: held-out rows of the validation set.
        normalize: scale rows: `none`, `mean_norm` (mean row norm sqrt(d_in)), `center` (mean removed), `standardize`
            (mean removed, mean squared norm d_in) or `zscore` (each dimension to mean 0 and variance 1).
        exclude_special_tokens: special tokens are context, but no rows.
        seed: of the order of documents and of all shuffles.
        device: of the model where there is no Trainer; `auto` is CUDA, then MPS, then the CPU.
        text_options: how the dataset is opened, and which tokens become rows.
        model_options: how the language model is loaded and run.
        buffer_options: where rows are mixed, and what is served.
        cache_options: how cached rows are read.
        resume_anyway: go on from a checkpoint although the settings differ.

    Raises:
        ValueError: settings that cannot work together, or that the chosen source of rows does not use.
    """

    hf_model: str | PreTrainedModel | None = None
    layer: int | list[int] | None = None
    hook: str | list[str] | None = None
    dataset_name: str | list[str] | datasets.Dataset | datasets.IterableDataset = "demo:docs"
    _: KW_ONLY
    shards: str | list[str] | None = None
    write_shards: str | None = None
    text_column: str = "text"
    dataset_split: str = "train"
    tokenizer: str | PreTrainedTokenizerBase | None = None
    seq_length: int = 128
    inference_batch_size: int = 16
    batch_size: int = 4096
    buffer_size: int | Literal["auto"] = "auto"
    prefetch: int | None = None
    max_tokens: int | None = None
    val_fraction: float = 0.05
    val_rows: int = 65_536
    normalize: Normalize = "none"
    exclude_special_tokens: bool = True
    seed: int = 0
    device: str = "auto"
    text_options: TextOptions = TextOptions()
    model_options: ModelOptions = ModelOptions()
    buffer_options: BufferOptions = BufferOptions()
    cache_options: CacheOptions = CacheOptions()
    resume_anyway: bool = False

    def __post_init__(self) -> None:
        check_normalize(self.normalize)
        _check_sizes(self)
        if unused := _unused(self):
            reason = (
                "with shards=, rows are used as they were written: leave this at its default"
                if self.shards is not None
                else "it is for reading a cache: give shards= or write_shards= too, or leave it at its default"
            )
            raise ValueError(f"{', '.join(unused)} would have no effect: {reason}")


def _unused(settings: DataSettings) -> list[str]:
    """Names of settings that differ from their defaults and that the chosen source of rows does not use."""
    cache = changed(settings.cache_options, CacheOptions())
    if settings.shards is None:
        return [] if settings.write_shards else [f"cache_options.{name}" for name in cache]
    model = changed(settings.model_options, ModelOptions()).keys() - {
        "kwargs"
    }  # for callbacks that load the model
    buffer = changed(settings.buffer_options, BufferOptions()).keys() - {"device", "dtype"}
    own = changed(settings, DataSettings).keys()
    return [
        *(name for name in _ONLY_LIVE if name in own),
        *(f"model_options.{name}" for name in sorted(model)),
        *(f"buffer_options.{name}" for name in sorted(buffer)),
    ]


def _check_sizes(settings: DataSettings) -> None:
    batch_size, buffer_size, max_tokens = settings.batch_size, settings.buffer_size, settings.max_tokens
    counts = {
        "batch_size": batch_size,
        "inference_batch_size": settings.inference_batch_size,
        "seq_length": settings.seq_length,
    }
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
    if not 0 <= settings.val_fraction < 1:
        raise ValueError(f"val_fraction={settings.val_fraction} must be at least 0 and below 1")
