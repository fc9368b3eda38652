"""Trace one forward pass of a model on the meta device: every module call, its shapes, and its residual sums.

In: a configuration or a model. Out: a `Trace`. No weights are loaded and no data is needed.

Architectures differ in module names, norms, multipliers and in whether attention and MLP run in parallel, but all of
them add to a residual stream. Each tensor is therefore followed as a linear form, such as
`input + 0.22 * (output of layers.3.mlp)`, from which `layer_map` finds the hook points without a table per
architecture.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from deeplens_lightning.model.hf_config import has_setting
from deeplens_lightning.model.linear_forms import Form, LinearForms
from deeplens_lightning.model.wrappers import unwrapped

BATCH, LENGTH = 3, 7
"""Shape of the traced tokens. Odd and unequal, so that no other dimension of a tensor has these sizes by accident."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one module.

    Events, which are the starts and ends of calls, are numbered in the order in which they happen.

    Attributes:
        path: path of the module inside the base model.
        module: the module, on the meta device.
        start: event number of the start of the call. A call ran inside every call whose `start` to `end` encloses it.
        end: event number of the end of the call.
        input_form: linear form of the first input; None if that is no tensor.
        output_form: linear form of the output, or of the first output of several; None if that is no tensor.
        d_in: last dimension of the first input if it has one row per token, else 0.
        d_out: last dimension of the output if it has one row per token, else 0.
    """

    path: str
    module: nn.Module = field(repr=False, compare=False)
    start: int
    end: int
    input_form: Form | None
    output_form: Form | None
    d_in: int
    d_out: int

    @property
    def name(self) -> str:
        """The last part of the path: the attribute that holds the module."""
        return self.path.rpartition(".")[2]

    def within(self, other: Call) -> bool:
        """Whether this call ran inside the other one."""
        return other.start < self.start and self.end < other.end


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All module calls of one forward pass.

    Attributes:
        family: `model_type` of the configuration.
        base: the model on the meta device: modules and shapes without weights.
        layers: path of the list of decoder (or encoder) layers.
        depth: number of layers.
        calls: all calls, in the order of their starts.
        term_events: event number at which each term of the linear forms first appeared.
        operations: SHA-256 digests of the tensor operations with their shapes and constants. The first one covers
            the operations before the first layer, as a set, because masks may be made once per layer; the others
            cover the sequence of operations in each layer.
    """

    family: str
    base: nn.Module = field(repr=False)
    layers: str
    depth: int
    calls: Sequence[Call]
    term_events: Mapping[int, int]
    operations: Sequence[str]

    def calls_of(self, path: str) -> list[Call]:
        """The calls of the module with this path."""
        return [call for call in self.calls if call.path == path]


def base_of(model: nn.Module) -> Any:
    """The part of a model that computes activations: without a head and, of an encoder-decoder, the encoder.

    Wrappers such as those of `torch.compile` and PEFT are left out, with adapters inside the layers left in.
    """
    base: Any = unwrapped(model).base_model
    if base.config.is_encoder_decoder or base.config.model_type in ("t5", "mt5", "umt5"):
        base = base.get_encoder()
    return base


def trace(model: PretrainedConfig | nn.Module) -> Trace:
    """Run the structure of a model once on the meta device and record its module calls; the result is cached.

    Raises:
        ValueError: the model takes no token ids, cannot run without data, or has no list of layers.
    """
    return _trace(Structure.of(model))


@dataclass(frozen=True, slots=True)
class Structure:
    """What determines the modules of a model, usable as a cache key.

    Attributes:
        kind: class of the model; None for the class that `AutoModel` takes.
        text: the configuration as JSON.
        config: the configuration.
    """

    kind: type[nn.Module] | None
    text: str
    config: PretrainedConfig = field(compare=False)

    @classmethod
    def of(cls, model: PretrainedConfig | nn.Module) -> Structure:
        """The structure of a configuration, or of a model, of which a wrapper is left out."""
        inner = model if isinstance(model, PretrainedConfig) else unwrapped(model)
        config = copy.deepcopy(inner if isinstance(inner, PretrainedConfig) else inner.config)
        kind = None if isinstance(inner, PretrainedConfig) else type(inner.base_model)
        return cls(kind, config.to_json_string(use_diff=False), config)

    def build(self, device: torch.device | str = "meta", attention: str = "eager") -> PreTrainedModel:
        """The base model in float32 and evaluation mode: on the meta device without weights, elsewhere with random ones.

        Args:
            device: where it is built.
            attention: name of the attention implementation.
        """
        config = copy.deepcopy(self.config)
        options: dict[str, Any] = {
            "dtype": torch.float32,
            "attn_implementation": attention,
            "experts_implementation": "batched_mm",  # the only one whose shapes do not depend on the routing
        }
        if self.kind is None:
            options["trust_remote_code"] = type(config).__module__.startswith("transformers_modules")
        make: Any = AutoModel.from_config if self.kind is None else cast(Any, self.kind)._from_config
        with torch.random.fork_rng(devices=[]), torch.device(device):
            base: PreTrainedModel = base_of(make(config, **options)).eval()
        return base


@lru_cache(maxsize=8)
def _trace(structure: Structure) -> Trace:
    family = structure.config.model_type
    base = structure.build()
    if "input_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"{family!r} models take no token ids; give a language model, whose input is `input_ids`"
        )
    layers = _layer_list(base)
    stack = cast(nn.ModuleList, base.get_submodule(layers))
    recorder = _Recorder([f"{layers}.{index}" for index in range(len(stack))])
    tokens = torch.ones(BATCH, LENGTH, dtype=torch.int64, device="meta")
    try:
        with ExitStack() as contexts:
            # BigBird makes modules, and with them random numbers, in its forward pass
            contexts.enter_context(torch.random.fork_rng(devices=[]))
            contexts.enter_context(torch.inference_mode(False))
            contexts.enter_context(torch.no_grad())
            contexts.enter_context(recorder.hooks(base))
            contexts.enter_context(recorder)
            base(input_ids=tokens, **({"use_cache": False} if has_setting(base.config, "use_cache") else {}))
    except NotImplementedError as error:
        raise ValueError(
            f"{family!r} models are not supported: most likely, which tokens a module computes depends on the text (as "
            "with global attention to some tokens, or experts that are given a list of tokens), so its rows cannot be "
            "told apart; give a model whose layers compute every token"
        ) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the hook points of {family!r} models cannot be found, because a forward pass on the meta device "
            f"(without weights) fails: {error}"
        ) from error
    return Trace(
        family=family,
        base=base,
        layers=layers,
        depth=len(stack),
        calls=sorted(recorder.calls, key=lambda call: call.start),
        term_events=recorder.forms.term_events,
        operations=[
            hashlib.sha256("\n".join(each if path else sorted(set(each))).encode()).hexdigest()
            for path, each in recorder.operations.items()
        ],
    )


def _layer_list(base: PreTrainedModel) -> str:
    """The path of the outermost list of modules that holds the text layers."""
    lists = {path: module for path, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {p: len(m) for p, m in lists.items() if not any(p.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise ValueError(
            f"{type(base).__name__} has no list of layers (an `nn.ModuleList`), so its layers have no numbers"
        )
    depth: int = base.config.get_text_config().num_hidden_layers
    return str(max(outer, key=lambda path: ("vision" not in path, outer[path] == depth, outer[path])))


class _Recorder(TorchFunctionMode):
    """Records module calls, tensor operations, and the linear form of every tensor."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.forms = LinearForms()
        self.operations: dict[str, list[str]] = {path: [] for path in ("", *layers)}
        self._layer: str | None = ""  # the layer that runs; "" before the first, None after a layer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _VALUES:  # it reads values, which tensors on the meta device do not have
            return _VALUES[func]
        form = self.forms.combine(func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            if form is not None:
                self.forms.set(out, form)
            if self._layer is not None:
                self.operations[self._layer].append(_fingerprint(func, args, kwargs))
        return out

    @contextmanager
    def hooks(self, base: nn.Module) -> Iterator[None]:
        """Hooks on every module of the model, which record its calls."""
        with ExitStack() as stack:
            for path, module in base.named_modules():
                if path:
                    before, after = self._hooks_of(path)
                    for handle in (
                        module.register_forward_pre_hook(before, with_kwargs=True),
                        module.register_forward_hook(after),
                    ):
                        stack.callback(handle.remove)
            yield

    def _hooks_of(self, path: str) -> tuple[Any, Any]:
        pending: list[tuple[int, Form | None, int]] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.forms.event += 1
            x = first_input(args, kwargs)
            if path in self.operations:
                self._layer = path
                if x is not None:
                    self.forms.start_term(x)
            pending.append((self.forms.event, None if x is None else self.forms.of(x), _row_width(x)))

        def after(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
            y = first_output(output)
            output_form = None if y is None else self.forms.of(y)
            self.forms.event += 1
            start, input_form, d_in = pending.pop()
            call = Call(
                path=path,
                module=module,
                start=start,
                end=self.forms.event,
                input_form=input_form,
                output_form=output_form,
                d_in=d_in,
                d_out=_row_width(y),
            )
            self.calls.append(call)
            if path in self.operations:
                self._layer = None

        return before, after


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input of a module that hook points read: the first positional argument, or `hidden_states`."""
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None


def first_output(output: Any) -> Tensor | None:
    """The output of a module that hook points read: the output, or the first of several."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, Tensor) else None


def _row_width(x: Tensor | None) -> int:
    """The width `d` of a traced tensor with one row per token, `(B, T, d)` or `(B * T, d)`; else 0."""
    if x is None or not x.is_floating_point() or x.shape[:-1] not in ((BATCH, LENGTH), (BATCH * LENGTH,)):
        return 0
    return x.shape[-1]


def _fingerprint(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """An operation as text: its name, the shapes of its tensors, and its other arguments."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape)
        if isinstance(value, tuple | list):
            return [plain(each) for each in value]
        return value if isinstance(value, int | float | str | None) else type(value).__name__

    options = [(key, plain(kwargs[key])) for key in sorted(kwargs)]
    return f"{func.__name__}{plain(args)}{options}"


_T = Tensor
_VALUES: dict[Any, Any] = {
    _T.__bool__: False,
    _T.__contains__: False,
    _T.item: 1,
    _T.__int__: 1,
    _T.__float__: 1.0,
}
"""Operations that read the values of a tensor, and the fixed result that the trace gives them."""
