"""The grouped settings of `ActivationDataModule`: text, model, buffer and cache, as frozen dataclasses.

Plain data that imports nothing else of the package. On the command line and in YAML they are nested keys:
`--data.text_options.drop_first_n 1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, signature
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_type_hints

Isolation = Literal["packed", "padded", "equal", "none"]
"""How the segments of a model batch are kept apart, and what `FrozenModel.activations` is then given.

- `packed`: several segments in a row; `position_ids` restart at each, pads count as one more; no mask.
- `padded`: one segment a row, padded on the right; `attention_mask` 1 at tokens, 0 at pads; no positions.
- `equal`: one segment a row, all of one length; neither.
- `none`: they are not kept apart: plain causal attention over the row; neither.
"""

Shuffle = Literal["auto", "global", "window", "none"]
"""How cached rows are shuffled: all at once, within windows of some random shards, or not at all."""

CACHE_BYTES = 10 * 2**30
"""Default bound on local copies of remote shards, in bytes."""

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How the dataset is opened, and which tokens become rows.

    Args:
        dataset_kwargs: for `datasets.load_dataset` (`name=`, `revision=`, `streaming=`, …).
        prepend_bos: True puts a BOS before every segment, False puts no special tokens around it; default what the
            tokenizer itself does.
        drop_first_n: tokens at the start of every segment that do not become rows.
    """

    dataset_kwargs: dict[str, Any] | None = None
    prepend_bos: bool | None = None
    drop_first_n: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How the language model is loaded and run.

    Args:
        kwargs: for `from_pretrained`: dtype, device_map, quantization_config, attn_implementation, revision, …
        compile: `torch.compile` the parts of the model between hook points.
        isolation: how the segments of a model batch are kept apart. `auto` probes the model; `packed` puts several
            in a row with position ids that restart, `padded` one in a row with an attention mask, `equal` one in a
            row and only equal lengths in a batch; `none` lets the segments of a block see each other.
    """

    kwargs: dict[str, Any] | None = None
    compile: bool = False
    isolation: Isolation | Literal["auto"] = "auto"


@dataclass(frozen=True, kw_only=True)
class BufferOptions:
    """Where rows are mixed, and what is served.

    Args:
        device: where the buffer and the batches are; default the device of the LightningModule.
        shuffle_blocks: shuffle blocks of tokens before the model, too.
        dtype: of served batches; `auto` leaves the activation dtype.
        max_norm_ratio: drop rows whose norm is above this multiple of the median norm (attention sinks).
    """

    device: str | None = None
    shuffle_blocks: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    max_norm_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How cached rows are read.

    Args:
        shuffle: `global` (all rows at once), `window` (some random shards at a time, for caches larger than
            memory), `none`, or `auto` by the size of the cache.
        checksums: check every shard when it is first read.
        dir: for copies of remote shards; default a temporary folder.
        bytes: bound on those copies.
    """

    shuffle: Shuffle = "auto"
    checksums: bool = False
    dir: str | None = None
    bytes: int = CACHE_BYTES


def changed(settings: Any, usual: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from `usual` (another one of its kind, or its class), by name."""
    found = {}
    for field in fields(settings):
        value, default = getattr(settings, field.name), getattr(usual, field.name)
        if value is not default and value != default:
            found[field.name] = value
    return found


def takes(kind: Callable[P, T]) -> Callable[[Callable[[S, T], None]], Callable[Concatenate[S, P], None]]:
    """Let an `__init__(self, settings)` be called with the arguments of `kind`, a dataclass of settings.

    Signature, annotations and docstring are those of `kind`, for people, type checkers and LightningCLI alike, so
    that each setting is written down in one place.
    """
    hints = get_type_hints(kind.__init__)
    given = [p.replace(annotation=hints[p.name]) for p in signature(kind).parameters.values()]

    def decorate(init: Callable[[S, T], None]) -> Callable[Concatenate[S, P], None]:
        def constructor(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, kind(*args, **kwargs))

        me = Parameter("self", Parameter.POSITIONAL_ONLY)
        constructor.__signature__ = Signature([me, *given])  # type: ignore[attr-defined]
        constructor.__annotations__ = {p.name: p.annotation for p in given} | {"return": None}
        constructor.__doc__ = kind.__doc__
        constructor.__name__, constructor.__qualname__ = init.__name__, init.__qualname__
        constructor.__module__ = init.__module__
        return constructor

    return decorate
