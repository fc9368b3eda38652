"""The language model, frozen and apart: loaded up to the deepest hook point, run up to it, left as it was.

In: a model as people have it (hub id, folder, GGUF file, `demo:lm`, an object) and hook points.
Out: activations `(batch, sequence, d_in)` per hook point.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deeplens_lightning.model.cpu_kernels import faster, replaceable
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.isolation import choose
from deeplens_lightning.model.pretrained import (
    load_base,
    load_config,
    load_tokenizer,
    max_positions,
    original_context,
)
from deeplens_lightning.model.tracing import Trace, base_of, first_input, first_output, trace
from deeplens_lightning.options import Isolation

__all__ = ["FrozenModel", "Isolation", "load_config", "load_tokenizer", "max_positions"]

logger = logging.getLogger(__name__)


_LONGEST_UNASKED_PROBE = 1024
"""Tokens that the probe runs on its own account; beyond, it needs to know that such segments will come."""


class _Captured(BaseException):
    """Raised in the last hook to leave the forward pass; never escapes `FrozenModel.activations`."""


class FrozenModel:
    """A language model that answers `activations`; no `nn.Module`, so that nothing trains, saves or moves it.

    Attributes:
        hook_points: what is read, in the user's order.
        config: of the whole model, however much of it was loaded.
        isolation: how segments are kept apart: what the probe chose, or the user.
        device: where tokens go and activations come from.
        dtypes: activation dtype by hook point name.
        identity: JSON-able: name, revision, architecture, dtype, and a digest that other weights change.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PretrainedConfig,
        hook_points: Sequence[HookPoint],
        *,
        name: str,
        traced: Trace,
        isolation: Isolation | Literal["auto"] = "auto",
        max_length: int | None = None,
        scaled_beyond: int | None = None,
        compile_model: bool = False,
    ) -> None:
        self.hook_points = tuple(hook_points)
        self.config = config
        self.device = base.device
        self._base: PreTrainedModel | None = base
        self._accepts = set(inspect.signature(base.forward).parameters)
        self._scaled_ropes = [m for m in base.modules() if _scales_by_length(m)]
        self._replaceable = [] if compile_model else replaceable(base)  # a compiler chooses kernels by itself
        self._lock = threading.Lock()
        self._exit = ExitStack()
        self._vocabulary = int(cast(Tensor, base.get_input_embeddings().weight).shape[0])
        first = self.activations(torch.zeros(1, 2, dtype=torch.int64))
        self.dtypes = {key: x.dtype for key, x in first.items()}
        self.isolation = self._isolate(max_length, scaled_beyond) if isolation == "auto" else isolation
        if compile_model:
            self._exit.enter_context(_compiled(base, traced.layers, self.hook_points))
        layers = [point.layer for point in self.hook_points]
        cut = None if None in layers else max(layer for layer in layers if layer is not None)
        self.identity = {
            "name": name,
            "revision": str(getattr(config, "_commit_hash", None) or ""),
            "architecture": type(base).__name__,
            "dtype": str(base.dtype),
            "weights": _digest(base, traced.layers, cut),
        }

    @classmethod
    def load(
        cls,
        hf_model: str | PreTrainedModel,
        hook_points: Sequence[HookPoint],
        *,
        device: torch.device | str,
        model_kwargs: Mapping[str, Any] | None = None,
        compile_model: bool = False,
        isolation: Isolation | Literal["auto"] = "auto",
        seq_length: int | None = None,
    ) -> FrozenModel:
        """Load what the deepest hook point needs, and find out how segments can share a batch.

        Args:
            hf_model: hub id, folder, `.gguf` file, `demo:lm`, or a loaded model, which stays where it is and
                as it is: no layer goes, hooks and flags are set for the length of a call.
            hook_points: from `resolve`, of the same model.
            device: where a model that is loaded here goes, unless `model_kwargs` has a `device_map`.
            model_kwargs: for `from_pretrained`: dtype, device_map, quantization_config, attn_implementation,
                revision, trust_remote_code (off unless given), or a value of the configuration.
            compile_model: `torch.compile` for every part between hook points.
            isolation: how to keep segments apart; `auto` probes the model.
            seq_length: the longest segment that will come, in tokens; with it the probe knows whether RoPE
                scaling by length matters.

        Raises:
            ValueError: `seq_length` exceeds the model's positions, weights are missing, a quantised model
                cannot run on the device, or no way of batching leaves rows as they are.
        """
        if not hook_points:
            raise ValueError("no hook points given; make them with resolve(config, layer, hook)")
        if isinstance(hf_model, PreTrainedModel):
            base, config, name = base_of(hf_model), hf_model.config, str(hf_model.name_or_path)
        else:
            config, name = load_config(hf_model, model_kwargs), hf_model
        original = original_context(config)
        limit = max_positions(config if isinstance(hf_model, str) else hf_model)
        if seq_length is not None and limit is not None and seq_length > limit:
            raise ValueError(
                f"seq_length={seq_length} exceeds the {limit} positions of {name}; give at most {limit}"
            )
        if isinstance(hf_model, str):
            base = load_base(hf_model, config, hook_points, torch.device(device), model_kwargs)
        return cls(
            base,
            config,
            hook_points,
            name=name,
            traced=trace(config if isinstance(hf_model, str) else hf_model),
            isolation=isolation,
            max_length=seq_length or limit,
            scaled_beyond=original
            if original and original < (seq_length or _LONGEST_UNASKED_PROBE)
            else None,
            compile_model=compile_model,
        )

    @property
    def base(self) -> PreTrainedModel:
        """The model itself.

        Raises:
            RuntimeError: it was closed.
        """
        if self._base is None:
            raise RuntimeError("this model was closed; load it again with FrozenModel.load")
        return self._base

    def activations(
        self, tokens: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the model up to the deepest hook point; `Isolation` says what to give besides tokens.

        One forward pass runs at a time. Gradients, autocast and dropout are off; the caller's modes, the
        global random state and the default dtype are neither used nor changed.

        Args:
            tokens: int64 `(B, T)`.
            position_ids: int64 `(B, T)`.
            attention_mask: int64 or bool `(B, T)`.

        Returns:
            `(B, T, d_in)` by canonical name, in `dtypes`, on the model's device.

        Raises:
            ValueError: a token id is beyond the embedding.
            RuntimeError: the model was closed.
        """
        base = self.base
        if tokens.device.type == "cpu" and tokens.numel() and int(tokens.max()) >= self._vocabulary:
            raise ValueError(
                f"token id {int(tokens.max())} is beyond the model's embedding of {self._vocabulary} rows; "
                "is the tokenizer the model's own?"
            )
        inputs = {"input_ids": tokens, "position_ids": position_ids, "attention_mask": attention_mask}
        given: dict[str, Any] = {
            key: x.to(self.device) for key, x in inputs.items() if x is not None and key in self._accepts
        }
        if "use_cache" in self._accepts:
            given["use_cache"] = False  # with a cache, packed segments leak into each other silently
        with self._lock, ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind in {"cpu", self.device.type}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_evaluating(base))
            stack.enter_context(faster(self._replaceable))
            for rope in self._scaled_ropes:
                stack.enter_context(_unscaled(rope))
            captured = stack.enter_context(_capturing(base, self.hook_points, tokens.shape))
            with suppress(_Captured):
                base(**given)
        return {point.name: captured[point.name] for point in self.hook_points}

    def close(self) -> None:
        """Let go of the model; one that was handed in is as it was."""
        with self._lock:
            self._exit.close()
            self._base = None
            self._scaled_ropes, self._replaceable = [], []

    def _isolate(self, max_length: int | None, scaled_beyond: int | None) -> Isolation:
        mode = choose(
            self.activations,
            vocab_size=min(self._vocabulary, self.config.get_text_config().vocab_size),
            max_length=max_length,
            original=scaled_beyond,
        )
        logger.info("segments are kept apart by isolation=%r", mode)
        return mode


@contextmanager
def _capturing(
    base: nn.Module, hook_points: Sequence[HookPoint], shape: Sequence[int]
) -> Iterator[dict[str, Tensor]]:
    """Hooks that fill a dictionary of this call's own, and leave the forward pass when it is full."""
    captured: dict[str, Tensor] = {}

    def keep(point: HookPoint, x: Tensor | None) -> None:
        if x is None:
            raise TypeError(f"{point.name}: the module passed no tensor")
        x = (x * point.scale if point.scale != 1 else x).reshape(*shape, -1)
        full = len(captured | {point.name: x}) == len(hook_points)
        captured[point.name] = x if full else x.clone()  # what runs later may add to it in place
        if full:
            raise _Captured

    with ExitStack() as stack:
        for point in hook_points:
            module = base.get_submodule(point.module)
            if point.side == "in":
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, point=point: keep(point, first_input(args, kwargs)),
                    with_kwargs=True,
                )
            else:
                handle = module.register_forward_hook(
                    lambda _, __, output, point=point: keep(point, first_output(output))
                )
            stack.callback(handle.remove)
        yield captured


@contextmanager
def _evaluating(base: nn.Module) -> Iterator[None]:
    """No dropout, and every module's own training flag afterwards."""
    training = [module for module in base.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _scales_by_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", "")
    names = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any("dynamic" in str(name) or name == "longrope" for name in names)


@contextmanager
def _unscaled(rope: nn.Module) -> Iterator[None]:
    """A RoPE as no sequence had stretched it yet, and as it was afterwards.

    Dynamic scaling remembers the longest sequence seen, so that rows would depend on what ran before.
    """
    attributes = {key: value for key, value in vars(rope).items() if not isinstance(value, dict)}
    buffers = {key: value.clone() for key, value in rope._buffers.items() if value is not None}
    for key in buffers:
        original = getattr(rope, key.replace("inv_freq", "original_inv_freq"), None)
        if "original" not in key and isinstance(original, Tensor):
            rope._buffers[key] = original.to(buffers[key].device, copy=True)
    for key in attributes:
        if key.endswith("max_seq_len_cached"):
            setattr(rope, key, rope.original_max_seq_len)
    try:
        yield
    finally:
        for key in [
            key for key in vars(rope) if key not in attributes and not isinstance(vars(rope)[key], dict)
        ]:
            delattr(rope, key)
        vars(rope).update(attributes)
        rope._buffers.update(buffers)


@contextmanager
def _compiled(base: nn.Module, layers: str, hook_points: Sequence[HookPoint]) -> Iterator[None]:
    """The largest layers and parts of layers with no hook point strictly inside, compiled."""
    hooked = [point.module for point in hook_points]
    with ExitStack() as stack:
        pending = [f"{layers}.{name}" for name, _ in base.get_submodule(layers).named_children()]
        while pending:
            path = pending.pop()
            module = base.get_submodule(path)
            if any(other.startswith(f"{path}.") for other in hooked):
                pending.extend(f"{path}.{name}" for name, _ in module.named_children())
            else:
                stack.callback(_restore_forward, module, vars(module).get("forward"))
                module.forward = torch.compile(module.forward)
        yield


def _restore_forward(module: nn.Module, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


def _digest(base: nn.Module, layers: str, cut: int | None) -> str:
    """SHA-256 over names, shapes and a few values of every parameter that a hook point may depend on."""
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        rest = name.removeprefix(f"{layers}.")
        beyond = cut is not None and rest != name and int(rest.partition(".")[0]) > cut
        if beyond or name.startswith("pooler"):
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":  # offloaded
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 16)][:32].float().cpu()
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
