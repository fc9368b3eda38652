"""`LatentPredictionWriter`: write the active latents of `trainer.predict` to Parquet files.

In: the `SparseLatents` that `predict_step` returns. Out: a file for each rank, in a folder for each SAE of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from pyarrow.parquet import ParquetWriter
from typing_extensions import override

from deeplens_lightning.callbacks.support import folder_name
from deeplens_lightning.disk.files import create, remove
from deeplens_lightning.sae.prediction import SparseLatents
from deeplens_lightning.sae.training import DictionaryTraining
from deeplens_lightning.shards.folder import Folder
from deeplens_lightning.shards.open_folder import open_folder
from deeplens_lightning.types import PROVENANCE

SCHEMA = pa.schema(
    [("row", pa.int64()), ("latent", pa.int32()), ("value", pa.float32())]
    + [(column, pa.int64()) for column in PROVENANCE]
)
GROUP = 2**19
"""Lines in a row group of a file; about 25 MB in memory."""


class LatentPredictionWriter(Callback):
    """Writes the active latents of `trainer.predict`, one line for each, to `<folder>/rank<number>.parquet`.

    Columns: `row` (number of the row among those that the rank predicted), `latent`, `value`, and the row's
    `document_hash`, `document_index`, `position` and `token_id` (-1 where unknown). A row without active latents has no
    line; the metadata of a file has the number of `rows`, and `d_sae`. In a grid each SAE has a folder with its name in
    `folder`. A file is there when it is whole: an interrupted prediction leaves none.

    Predict with `return_predictions=False`, so that the Trainer does not keep the latents in memory as well.

    Args:
        folder: where to write, a path or an fsspec URL; it must not contain Parquet files.

    Raises:
        FileExistsError: at the start, the folder contains Parquet files.
        TypeError: `predict_step` returns something else than `SparseLatents`, or a dict of them by name.
    """

    # Not a BasePredictionWriter: Lightning warns that it finds no indices of batches if the loader is no DataLoader.

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self._files: dict[str, _LatentFile] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that no files of an earlier prediction would be mixed with the new ones; no rank has written yet."""
        if stage != "predict":
            return
        names = list(pl_module.dictionaries) if isinstance(pl_module, DictionaryTraining) else [""]
        folders = {name: open_folder(self._where(name)) for name in names}
        for folder in folders.values():
            found = [name for name in folder.sizes() if name.endswith(".parquet")]
            if found:
                raise FileExistsError(
                    f"{folder.where} contains {found[0]}: delete the files of the earlier prediction, or choose another "
                    "folder"
                )
        file_name = f"rank{trainer.global_rank:05d}.parquet"
        self._files = {name: _LatentFile(folder, file_name) for name, folder in folders.items()}

    @override
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        found = outputs if isinstance(outputs, Mapping) else {"": outputs}
        for name, latents in found.items():
            if not isinstance(latents, SparseLatents) or name not in self._files:
                raise TypeError(
                    f"predict_step of {type(pl_module).__name__} returned {type(latents).__name__}, and "
                    "LatentPredictionWriter writes SparseLatents: predict with SparseAutoencoder or "
                    "SparseAutoencoderGrid, or return deeplens_lightning.sae.SparseLatents"
                )
            self._files[name].add(latents)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for file in self._files.values():
            file.publish()
        self._files = {}

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._discard()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._discard()

    def _where(self, name: str) -> str:
        return f"{self.folder}/{folder_name(name)}" if name else self.folder

    def _discard(self) -> None:
        for file in self._files.values():
            file.discard()
        self._files = {}


class _LatentFile:
    """A Parquet file that is written under a temporary name.

    Args:
        folder: the folder.
        name: final name of the file.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        folder.create()
        self._staged = folder.stage(name)
        self._file = create(self._staged)
        self._writer = ParquetWriter(self._file, SCHEMA, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._lines = self._rows = self._d_sae = 0

    def add(self, latents: SparseLatents) -> None:
        """Append the active latents of one batch."""
        rows = latents.rows.cpu().long()
        if latents.provenance is None:
            origins = torch.full((len(rows), len(PROVENANCE)), -1)
        else:
            origins = latents.provenance.stacked().cpu()[rows]
        columns = [rows + self._rows, latents.latents.int().cpu(), latents.values.float().cpu()]
        columns += origins.unbind(1)
        self._waiting.append(pa.table([column.numpy() for column in columns], schema=SCHEMA))
        self._lines += len(rows)
        self._rows += latents.shape[0]
        self._d_sae = latents.shape[1]
        if self._lines >= GROUP:
            self._flush()

    def publish(self) -> None:
        """Write what is left, and give the file its final name."""
        self._flush()
        self._writer.add_key_value_metadata({"rows": str(self._rows), "d_sae": str(self._d_sae)})
        self._writer.close()
        self._file.close()
        self._folder.publish(self._staged, self._name)

    def discard(self) -> None:
        """Delete the unfinished file."""
        self._writer.close()
        self._file.close()
        remove(self._staged)

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks(), row_group_size=GROUP)
        self._waiting, self._lines = [], 0
