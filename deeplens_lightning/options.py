"""The grouped settings of `ActivationDataModule`: text, model, buffer and cache, as frozen dataclasses.

Plain data, with no imports from the package. On the command line and in YAML they are nested keys:
`--data.text_options.drop_first_n 1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from inspect import Parameter, Signature, signature
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_type_hints

Isolation = Literal["packed", "padded", "equal", "none"]
"""How the segments in a model batch are kept from attending to each other, and the inputs that the model then gets.

- `packed`: several segments per sequence. `position_ids` restart at each segment, and pads count as one more segment.
  No attention mask.
- `padded`: one segment per sequence, padded on the right. `attention_mask` is 1 at tokens and 0 at pads. No position
  ids.
- `equal`: one segment per sequence, all of the same length. No attention mask, no position ids.
- `none`: segments attend to each other: plain causal attention over the sequence. No attention mask, no position ids.
"""

Shuffle = Literal["auto", "global", "window", "none"]
"""How cached rows are shuffled: over the whole cache, within windows of a few random stretches of rows, or not
at all."""

CACHE_BYTES = 10 * 2**30
"""Default limit for the local copies of remote shards, in bytes."""
TIMEOUT = 60.0
"""Default time after which a server that sends nothing is given up, in seconds."""

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How the dataset is opened, and which tokens become rows.

    Args:
        dataset_kwargs: keyword arguments for `datasets.load_dataset` (`name=`, `revision=`, `streaming=`, …).
        prepend_bos: True puts a BOS token before every segment, False puts no special tokens around it, None (the
            default) puts the special tokens that the tokenizer itself adds.
        drop_first_n: number of tokens at the start of every segment that do not become rows.
        test_fraction: share of the documents that is held out for `trainer.test`, by the hash of their text; also for
            cached rows. They are used neither for training nor for validation. 0 lets `test` use the validation set.
    """

    dataset_kwargs: dict[str, Any] | None = None
    prepend_bos: bool | None = None
    drop_first_n: int = 0
    test_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How the language model is loaded and run.

    Args:
        kwargs: keyword arguments for `from_pretrained`: dtype, device_map, quantization_config, attn_implementation,
            revision, …
        compile: run `torch.compile` on the parts of the model between hook points.
        isolation: how segments in a model batch are kept from attending to each other. `auto` tests the model and
            chooses; `packed` puts several segments in a sequence with position ids that restart; `padded` puts one in a
            sequence with an attention mask; `equal` puts one in a sequence and only equal lengths in a batch; `none`
            lets the segments of a block attend to each other.
    """

    kwargs: dict[str, Any] | None = None
    compile: bool = False
    isolation: Isolation | Literal["auto"] = "auto"


@dataclass(frozen=True, kw_only=True)
class BufferOptions:
    """Where rows are shuffled and kept, which rows are dropped, and the dtype of batches.

    Args:
        device: device of the buffer and the batches, `cpu`, `cuda`, `cuda:1` or `mps`; default the device of the
            LightningModule.
        shuffle_blocks: also shuffle the blocks of tokens before the model runs on them.
        dtype: dtype of batches: `float32`, `bfloat16`, `float16`, or `auto` for the dtype of the activations.
        max_norm_ratio: drop rows whose norm is above this multiple of the median norm (attention sinks); None keeps
            all rows.
        val_bytes: largest size of the validation set in memory, in bytes over all ranks; it has fewer than `val_rows`
            rows where they would need more.
    """

    device: str | None = None
    shuffle_blocks: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    max_norm_ratio: float | None = None
    val_bytes: int = 10**9


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """How cached rows are read.

    Args:
        shuffle: `global` (over all rows), `window` (over a few random stretches of rows at a time, for caches larger
            than memory), `none`, or `auto` (`global` if the cache fits in memory, otherwise `window`).
        checksums: compare every shard with its checksum when it is first read.
        dir: folder for local copies of remote shards; default a temporary folder.
        bytes: largest total size of those copies, in bytes: of all runs and ranks that use the same folder, and of what
            earlier runs left there.
        timeout: seconds without a byte after which a server is given up, in listing, reading, downloading and uploading.
    """

    shuffle: Shuffle = "auto"
    checksums: bool = False
    dir: str | None = None
    bytes: int = CACHE_BYTES
    timeout: float = TIMEOUT


def changed(settings: Any, usual: Any) -> dict[str, Any]:
    """The fields of a dataclass whose values differ from those of `usual`: field name to value.

    Args:
        settings: an instance of a dataclass.
        usual: an instance of the same class, or the class itself, whose class attributes are the defaults.
    """
    defaults = values(usual)
    return {
        name: value
        for name, value in values(settings).items()
        if value is not defaults[name] and value != defaults[name]
    }


def values(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass with their values, which are not copied: field name to value.

    Args:
        settings: an instance of a dataclass, or the class itself, whose class attributes are the defaults.
    """
    # `dataclasses` has no other way to read a field by its name
    return {field.name: getattr(settings, field.name) for field in fields(settings)}


def takes(kind: Callable[P, T]) -> Callable[[Callable[[S, T], None]], Callable[Concatenate[S, P], None]]:
    """Decorate an `__init__(self, settings)` so that it takes the fields of a settings dataclass as arguments.

    A wrong name of an argument is a TypeError with the nearest one, also of those in groups.

    The decorated `__init__` has the signature, annotations and docstring of `kind`, which help(), type checkers and
    LightningCLI read. Each setting is therefore defined in one place.

    Args:
        kind: the dataclass of settings.
    """
    hints = get_type_hints(kind.__init__)
    given = [p.replace(annotation=hints[p.name]) for p in signature(kind).parameters.values()]
    arguments = {p.name: p.annotation for p in given}

    def decorate(init: Callable[[S, T], None]) -> Callable[Concatenate[S, P], None]:
        def constructor(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
            if unknown := kwargs.keys() - arguments.keys():
                raise TypeError(_no_argument(type(self).__name__, min(unknown), arguments))
            init(self, kind(*args, **kwargs))

        me = Parameter("self", Parameter.POSITIONAL_ONLY)
        constructor.__signature__ = Signature([me, *given])  # type: ignore[attr-defined]
        constructor.__annotations__ = arguments | {"return": None}
        constructor.__doc__ = kind.__doc__
        constructor.__name__, constructor.__qualname__ = init.__name__, init.__qualname__
        constructor.__module__ = init.__module__
        return constructor

    return decorate


def _no_argument(owner: str, name: str, arguments: dict[str, Any]) -> str:
    """Say that a constructor has no such argument, and how to write the nearest one, in a group of settings too."""
    known = {
        field.name: f"{group}={kind.__name__}({field.name}=...)"
        for group, kind in arguments.items()
        if is_dataclass(kind) and isinstance(kind, type)
        for field in fields(kind)
    } | {argument: f"{argument}=..." for argument in arguments}
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {known[near[0]]}?" if near else f"help({owner}.__init__) lists them"
    return f"{owner} has no argument {name!r}; {hint}"
