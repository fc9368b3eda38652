"""Errors of reading and writing caches; every message names the file and the fix."""

from __future__ import annotations


class ShardError(ValueError):
    """A cache cannot be read, or cannot be continued."""


class DamagedShardError(ShardError):
    """A file of a cache is missing, truncated, altered, or not a shard."""


class UnreachableError(ShardError):
    """A server or file system refuses, fails or does not answer, after some tries."""


class OtherConfigError(ShardError):
    """The folder holds a cache of another configuration; the message lists the differences."""


class FolderLostError(ShardError):
    """The folder of a cache was removed or replaced while rows were being written to it."""


class NonFiniteError(ShardError):
    """Activations to be written hold NaN or infinity."""


class DiskFullError(OSError):
    """The disk has no space for the next shard; the cache stays valid and can be continued.

    Args:
        message: what is full, and what to do.
        missing: bytes to free.

    Attributes:
        missing: bytes to free.
    """

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing
