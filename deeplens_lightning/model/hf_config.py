"""Read settings of a transformers configuration that not every architecture has."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_ABSENT = object()


def setting(config: PretrainedConfig, name: str, default: Any = None) -> Any:
    """The value of a setting such as `vocab_size`, or `default` where the architecture has no such setting."""
    # A dictionary lookup in `config.to_dict()` misses names that `attribute_map` or a property resolves.
    return getattr(config, name, default)


def has_setting(config: PretrainedConfig, name: str) -> bool:
    """Whether the architecture has this setting, whatever its value."""
    return setting(config, name, _ABSENT) is not _ABSENT
