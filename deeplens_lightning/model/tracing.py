"""What a model does, watched on the meta device: which modules run, on what shapes, and what adds to what.

In: a config or a model. Out: a `Trace` of every module call of one forward pass without weights or data.
Architectures differ in names, norms, multipliers and parallel halves; what they share is arithmetic, so the
residual stream is followed as a linear form, `input + 0.22 * (output of layers.3.mlp)`, whatever its names.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

BATCH, LENGTH = 3, 7
"""The traced forward's shape: two odd sizes that a per-token tensor cannot have by accident."""

Form = Mapping[int, float]
"""A tensor as a sum: coefficients by term. A term is a tensor that no followed operation made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one module.

    Attributes:
        path: inside the base model.
        start: event number when it began; it ran inside every call whose `start..end` encloses it.
        end: event number when it returned.
        given: the first input, as a form; None when it was no tensor.
        made: the output (the first of a tuple), likewise.
        d_given: last dimension of the input if it has one row per token, else 0.
        d_made: likewise of the output.
    """

    path: str
    module: nn.Module = field(repr=False, compare=False)
    start: int
    end: int
    given: Form | None
    made: Form | None
    d_given: int
    d_made: int

    @property
    def name(self) -> str:
        """The attribute that holds the module."""
        return self.path.rpartition(".")[2]

    def within(self, other: Call) -> bool:
        """Whether this call ran inside the other one."""
        return other.start < self.start and self.end < other.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Every module call of one forward pass, in the order of their starts.

    Attributes:
        family: `model_type` of the configuration.
        base: the model on the meta device: structure without weights.
        layers: path of the list of decoder (or encoder) layers.
        depth: number of layers.
        calls: all calls.
        born: event number at which a term appeared.
        operations: digests of the operations with their shapes and constants: of the set of those before the
            layers (masks may be made again for each), then of the sequence in each layer.
    """

    family: str
    base: nn.Module = field(repr=False)
    layers: str
    depth: int
    calls: Sequence[Call]
    born: Mapping[int, int]
    operations: Sequence[str]

    def of(self, path: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.path == path]


def base_of(model: PreTrainedModel) -> Any:
    """The part of a model that makes activations: no head, and of an encoder-decoder the encoder."""
    base: Any = model.base_model
    if base.config.is_encoder_decoder or base.config.model_type in ("t5", "mt5", "umt5"):
        base = base.get_encoder()
    return base


def trace(model: PretrainedConfig | PreTrainedModel) -> Trace:
    """Run the structure of a model once on the meta device, and write down what happens.

    Raises:
        ValueError: the architecture cannot be run without data, or has no list of layers.
    """
    config = copy.deepcopy(model if isinstance(model, PretrainedConfig) else model.config)
    kind = None if isinstance(model, PretrainedConfig) else type(model.base_model)
    return _trace(_Structure(kind, config.to_json_string(use_diff=False), config))


@dataclass(frozen=True, slots=True)
class _Structure:
    """What determines a trace: the class (None: the one that `AutoModel` takes) and the configuration."""

    kind: type[nn.Module] | None
    text: str
    config: PretrainedConfig = field(compare=False)

    def build(self) -> PreTrainedModel:
        """The base model on the meta device: modules and shapes, no weights."""
        config = copy.deepcopy(self.config)
        options: dict[str, Any] = {
            "dtype": torch.float32,
            "attn_implementation": "eager",
            "experts_implementation": "batched_mm",  # the only one whose shapes do not depend on the routing
        }
        if self.kind is None:
            options["trust_remote_code"] = type(config).__module__.startswith("transformers_modules")
        make: Any = AutoModel.from_config if self.kind is None else cast(Any, self.kind)._from_config
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            base: PreTrainedModel = base_of(make(config, **options)).eval()
        return base


@lru_cache(maxsize=8)
def _trace(structure: _Structure) -> Trace:
    family = structure.config.model_type
    base = structure.build()
    if "input_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(f"{family!r} models take no token ids; only models of text are read")
    layers = _layer_list(base)
    stack = cast(nn.ModuleList, base.get_submodule(layers))
    watch = _Watch([f"{layers}.{index}" for index in range(len(stack))])
    tokens = torch.ones(BATCH, LENGTH, dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode(False), torch.no_grad(), watch.watching(base), watch:
            base(input_ids=tokens, **({"use_cache": False} if hasattr(base.config, "use_cache") else {}))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{family!r} models cannot be searched for hook points: a pass without weights says: {error}"
        ) from error
    return Trace(
        family=family,
        base=base,
        layers=layers,
        depth=len(stack),
        calls=sorted(watch.calls, key=lambda call: call.start),
        born=watch.born,
        operations=[
            hashlib.sha256("\n".join(each if path else sorted(set(each))).encode()).hexdigest()
            for path, each in watch.operations.items()
        ],
    )


def _layer_list(base: PreTrainedModel) -> str:
    """The path of the outermost list of modules that holds the text layers."""
    lists = {path: module for path, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {p: len(m) for p, m in lists.items() if not any(p.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise ValueError(
            f"{type(base).__name__} has no list of layers, so there is nothing to count layers in"
        )
    depth: int = base.config.get_text_config().num_hidden_layers
    return str(max(outer, key=lambda path: ("vision" not in path, outer[path] == depth, outer[path])))


class _Watch(TorchFunctionMode):
    """Follows tensors through additions and constant factors, and modules through their calls."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self.clock = 0
        self.calls: list[Call] = []
        self.born: dict[int, int] = {}
        self.operations: dict[str, list[str]] = {path: [] for path in ("", *layers)}
        self._layer: str | None = ""
        self._forms: dict[int, Form] = {}
        self._kept: list[Tensor] = []  # so that no id is used twice

    def form(self, x: Tensor) -> Form:
        if id(x) not in self._forms:
            self.begin(x)
        return self._forms[id(x)]

    def begin(self, x: Tensor) -> None:
        """Let a tensor be a term of its own from here on."""
        term = len(self.born)
        self.born[term] = self.clock
        self._set(x, {term: 1.0})

    def _set(self, x: Tensor, form: Form) -> None:
        self._kept.append(x)
        self._forms[id(x)] = MappingProxyType(dict(form))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERS:  # a question to data, which the meta device does not have
            return _ANSWERS[func]
        form = self._follow(func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            if form is not None:
                self._set(out, form)
            if self._layer is not None:
                self.operations[self._layer].append(_fingerprint(func, args, kwargs))
        return out

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form | None:
        if not args or not isinstance(args[0], Tensor):
            return None
        x, other = args[0], args[1] if len(args) > 1 else kwargs.get("other")
        if func in _ADD and isinstance(other, Tensor):
            alpha = kwargs.get("alpha", 1)
            return _sum(self.form(x), self.form(other), alpha)
        if func in _MUL and isinstance(other, int | float):
            return {term: factor * other for term, factor in self.form(x).items()}
        if func in _SAME:
            return self.form(x)
        return None

    @contextmanager
    def watching(self, base: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for path, module in base.named_modules():
                if path:
                    before, after = self._hooks(path)
                    for handle in (
                        module.register_forward_pre_hook(before, with_kwargs=True),
                        module.register_forward_hook(after),
                    ):
                        stack.callback(handle.remove)
            yield

    def _hooks(self, path: str) -> tuple[Any, Any]:
        pending: list[tuple[int, Form | None, int]] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.clock += 1
            x = first_input(args, kwargs)
            if path in self.operations:
                self._layer = path
                if x is not None:
                    self.begin(x)
            pending.append((self.clock, None if x is None else self.form(x), per_token(x)))

        def after(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
            y = first_output(output)
            made = None if y is None else self.form(y)
            self.clock += 1
            start, given, d_given = pending.pop()
            call = Call(
                path=path,
                module=module,
                start=start,
                end=self.clock,
                given=given,
                made=made,
                d_given=d_given,
                d_made=per_token(y),
            )
            self.calls.append(call)
            if path in self.operations:
                self._layer = None

        return before, after


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a module works on: its first positional argument, or `hidden_states`."""
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


def first_output(output: Any) -> Tensor | None:
    """What a module makes: its output, or the first of several."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, Tensor) else None


def per_token(x: Tensor | None) -> int:
    """The width of a traced tensor with one row per token, `(B, T, d)` or `(B * T, d)`; else 0."""
    if x is None or not x.is_floating_point() or x.shape[:-1] not in ((BATCH, LENGTH), (BATCH * LENGTH,)):
        return 0
    return x.shape[-1]


def _sum(a: Form, b: Form, alpha: float) -> Form:
    return {term: a.get(term, 0) + alpha * b.get(term, 0) for term in (*a, *(t for t in b if t not in a))}


def _fingerprint(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        if isinstance(value, tuple | list):
            return [plain(each) for each in value]
        return value if isinstance(value, int | float | str | None) else type(value).__name__

    options = [(key, plain(kwargs[key])) for key in sorted(kwargs)]
    return f"{getattr(func, '__name__', func)}{plain(args)}{options}"


_T = Tensor
_ADD = {torch.add, _T.add, _T.add_, _T.__add__, _T.__radd__, _T.__iadd__}
_MUL = {torch.mul, torch.multiply, _T.mul, _T.mul_, _T.__mul__, _T.__rmul__, _T.__imul__}
_SAME = {
    torch.dropout,
    nn.functional.dropout,
    torch.reshape,
    _T.view,
    _T.reshape,
    _T.contiguous,
    _T.clone,
    _T.to,
    _T.float,
    _T.type_as,
}
_ANSWERS: dict[Any, Any] = {
    _T.__bool__: False,
    _T.__contains__: False,
    _T.item: 1,
    _T.__int__: 1,
    _T.__float__: 1.0,
}
