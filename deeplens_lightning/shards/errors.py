"""What can be wrong with a cache, each with what to do about it."""

from __future__ import annotations


class ShardError(ValueError):
    """A cache cannot be read or continued as it is; the message names the file and the fix."""


class DamagedShardError(ShardError):
    """A file of a cache is missing, truncated, altered, or no shard at all."""


class OtherConfigError(ShardError):
    """A folder holds a cache of another configuration; the message names the differences."""


class NonFiniteError(ShardError):
    """Activations to be written hold NaN or infinity."""


class DiskFullError(OSError):
    """There is no room for the next shard; the cache stays valid and can be continued.

    Attributes:
        missing: how many bytes more are needed.
    """

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing
