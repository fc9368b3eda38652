"""`DataSettings`: the arguments of `ActivationDataModule`, checked before anything is loaded.

In: the arguments that a user gave. Out: one frozen object, which the live and the cached source read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from os import PathLike
from typing import Literal

import datasets
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeplens_lightning.devices import check_device
from deeplens_lightning.normalization import Normalize, check_normalize
from deeplens_lightning.options import BufferOptions, CacheOptions, ModelOptions, TextOptions, changed

DEMO_LM = "demo:lm"
DEFAULT_LAYER, DEFAULT_HOOK = 3, "mlp_act"

_ONLY_LIVE = (
    "dataset_name", "text_column", "dataset_split", "write_shards", "tokenizer", "seq_length",
    "inference_batch_size", "buffer_size", "exclude_special_tokens",
)  # fmt: skip
"""Settings without effect with `shards`, because they describe how rows are computed."""


@dataclass(frozen=True, eq=False)
class DataSettings:
    """Settings of `ActivationDataModule`.

    Args:
        hf_model: the language model: hub id, folder, `.gguf` file, `demo:lm` (embedded, the default), or a loaded
            model, which is not changed. With `shards`, the model that the rows were computed with; default the name
            that the cache records.
        layer: one layer or several, counted from 0, negative ones from the end; default 3, with `shards` all layers in
            the cache.
        hook: one hook point or several; default `mlp_act`, with `shards` all in the cache. A kind (`mlp_in`, `mlp_act`,
            `mlp_post`, `mlp_out`, `attn_out`, `attn_z`, `resid_pre`, `resid_mid`, `resid_post`, `final_norm`), a
            canonical name (`layers.3.mlp_out`), a TransformerLens name (`blocks.3.hook_mlp_out`), or a module path
            (`transformer.h.3.mlp`, with `:in` at its end for the module's input). For bare tensor files, `layer` and
            `hook` give the name of their rows.
        dataset_name: the text: hub id, path or glob of txt, jsonl or parquet files or a list of them, a `datasets`
            object, a list of texts, or `demo:docs` (embedded).
        shards: read rows from here instead of running a model on text: folders written by `extract`, bare `.pt` tensors
            as saved by DeepLens, globs, or fsspec URLs; or a tensor `(rows, d_in)` in memory, which is not copied.
        write_shards: folder or fsspec URL of a cache. The first epoch writes it while training; later epochs, and later
            runs with the same settings, read it.
        text_column: column of the dataset with texts or token ids.
        dataset_split: split of a dataset on the hub, such as `train` or `validation`.
        tokenizer: hub id, folder or a loaded tokenizer; default the model's own.
        seq_length: length of a block, and the largest length of a segment, in tokens.
        inference_batch_size: blocks per forward pass of the model; `auto` takes as many as hold 16 384 tokens on an
            accelerator and 2048 on a CPU. A resumed run keeps the number that `auto` chose, on another device too.
        batch_size: rows per batch.
        buffer_size: number of rows in the shuffle buffer; `auto` is at most 262 144 rows and 1 GB, the same on
            every device.
        prefetch: number of batches computed ahead in a thread; default 2 on CUDA, otherwise 0.
        max_tokens: rows per Trainer epoch, the sum over all ranks; the next epoch continues in the text. Default one
            pass over the text.
        val_fraction: share of the documents that is held out for validation, by the hash of their text; 0 to below 1.
        val_rows: number of held-out rows in the validation set, and in the test set if `text_options.test_fraction`
            gives it documents of its own; `buffer_options.val_bytes` limits their size.
        normalize: normalisation of rows: `none`, `mean_norm` (mean row norm sqrt(d_in)), `center` (mean removed),
            `standardize` (mean removed, mean squared norm d_in) or `zscore` (each dimension to mean 0 and variance 1).
        exclude_special_tokens: leave special tokens out of the rows; the model still reads them.
        seed: seed of the order of documents and of all shuffles.
        device: device of the model if there is no Trainer: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the first of
            CUDA, MPS and the CPU that is there.
        text_options: how the dataset is opened, and which tokens become rows.
        model_options: how the language model is loaded and run.
        buffer_options: where rows are shuffled, which rows are dropped, and the dtype of batches.
        cache_options: how cached rows are read.
        resume_anyway: continue from a checkpoint even if the settings differ.

    Raises:
        ValueError: a value is out of range, settings contradict each other, or a setting has no effect on the chosen
            source of rows.
    """

    hf_model: str | PreTrainedModel | None = None
    layer: int | list[int] | None = None
    hook: str | list[str] | None = None
    dataset_name: str | list[str] | datasets.Dataset | datasets.IterableDataset = "demo:docs"
    _: KW_ONLY
    shards: str | list[str] | Tensor | None = None
    write_shards: str | None = None
    text_column: str = "text"
    dataset_split: str = "train"
    tokenizer: str | PreTrainedTokenizerBase | None = None
    seq_length: int = 128
    inference_batch_size: int | Literal["auto"] = 16
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

    @property
    def test_documents(self) -> dict[str, float]:
        """`test_fraction` for fingerprints and manifests; empty if it is 0, as in those of releases without it."""
        fraction = self.text_options.test_fraction
        return {"test_fraction": fraction} if fraction else {}

    def __post_init__(self) -> None:
        if not isinstance(self.shards, str | PathLike | Sequence | Tensor | None):
            raise ValueError(
                f"shards= is of type {type(self.shards).__name__}: give a path, a list of paths or a tensor "
                "(rows, d_in), such as torch.from_numpy(x)"
            )
        check_normalize(self.normalize)
        check_device(self.device)
        if self.buffer_options.device is not None:
            check_device(self.buffer_options.device, "buffer_options.device")
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
    text = changed(settings.text_options, TextOptions()).keys() - {"test_fraction"}
    # Callbacks that load the model use its `kwargs`.
    model = changed(settings.model_options, ModelOptions()).keys() - {"kwargs"}
    buffer = changed(settings.buffer_options, BufferOptions()).keys() - {"device", "dtype", "val_bytes"}
    own = changed(settings, DataSettings).keys()
    files = cache.keys() - {"shuffle"} if isinstance(settings.shards, Tensor) else set()
    return [
        *(name for name in _ONLY_LIVE if name in own),
        *(f"text_options.{name}" for name in sorted(text)),
        *(f"model_options.{name}" for name in sorted(model)),
        *(f"buffer_options.{name}" for name in sorted(buffer)),
        *(f"cache_options.{name}" for name in sorted(files)),
    ]


def _check_sizes(settings: DataSettings) -> None:
    batch_size, buffer_size, max_tokens = settings.batch_size, settings.buffer_size, settings.max_tokens
    automatic = (
        ("buffer_size", buffer_size, "rows"),
        ("inference_batch_size", settings.inference_batch_size, "blocks"),
    )
    for name, given, unit in automatic:
        if not isinstance(given, int) and given != "auto":
            raise ValueError(f'{name}={given!r} must be a number of {unit} or "auto"')
    counts = {
        "batch_size": batch_size,
        "inference_batch_size": settings.inference_batch_size,
        "seq_length": settings.seq_length,
        "buffer_options.val_bytes": settings.buffer_options.val_bytes,
    }
    for name, value in counts.items():
        if not isinstance(value, str) and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if isinstance(buffer_size, int) and buffer_size < batch_size:
        raise ValueError(
            f"buffer_size={buffer_size} is below batch_size={batch_size}: rows are shuffled in the buffer, so give a "
            f'multiple of batch_size, such as {16 * batch_size}, or "auto"'
        )
    if max_tokens is not None and max_tokens < batch_size:
        raise ValueError(
            f"max_tokens={max_tokens} is below batch_size={batch_size}: an epoch would have no batch; give at least "
            f"{batch_size} for each rank"
        )
    if not 0 <= settings.val_fraction < 1:
        raise ValueError(f"val_fraction={settings.val_fraction} must be at least 0 and below 1")
    test_fraction = settings.text_options.test_fraction
    if test_fraction < 0 or not settings.val_fraction + test_fraction < 1:
        raise ValueError(
            f"text_options.test_fraction={test_fraction} must be at least 0, and below 1 together with "
            f"val_fraction={settings.val_fraction}: no document would be left to train on"
        )
