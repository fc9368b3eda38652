"""The on-disk cache of activations: write it once, verify it, read it in shuffled batches.

`ShardWriter` writes shards, and continues after a kill. `ShardStream` reads them in shuffled batches. `verify` compares
every shard with its checksum. `format.py` describes the files.
"""

from deeplens_lightning.shards.catalog import Catalog, open_catalog
from deeplens_lightning.shards.errors import (
    DamagedShardError,
    DiskFullError,
    FolderLostError,
    NonFiniteError,
    OtherConfigError,
    ShardError,
)
from deeplens_lightning.shards.format import Manifest, Resume, Rows
from deeplens_lightning.shards.rowset import heldout
from deeplens_lightning.shards.shard_stream import ShardStream
from deeplens_lightning.shards.verify import Report, verify
from deeplens_lightning.shards.writer import ShardWriter

__all__ = [
    "Catalog",
    "DamagedShardError",
    "DiskFullError",
    "FolderLostError",
    "Manifest",
    "NonFiniteError",
    "OtherConfigError",
    "Report",
    "Resume",
    "Rows",
    "ShardError",
    "ShardStream",
    "ShardWriter",
    "heldout",
    "open_catalog",
    "verify",
]
