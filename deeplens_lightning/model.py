"""The language model, frozen and apart: loaded up to the deepest hook point, run up to it, left as it was.

In: a model as people have it (hub id, folder, GGUF file, `demo:lm`, an object) and hook points.
Out: activations `(batch, sequence, d_in)` per hook point.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deeplens_lightning.hook_points import HookPoint

Isolation = Literal["packed", "padded", "equal", "none"]
"""How the segments of a model batch are kept apart, and what `FrozenModel.activations` then needs.

- `packed`: several segments in a row; `position_ids` restart at each (pads count as one more segment), no mask.
- `padded`: one segment a row, padded on the right; `attention_mask` 1 at tokens and 0 at pads, no positions.
- `equal`: one segment a row, all of one length: neither.
- `none`: segments see each other; neither.
"""

_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
logger = logging.getLogger(__name__)


def load_config(hf_model: str, model_kwargs: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The configuration of a model, without its weights."""
    name, kwargs = locate(hf_model, model_kwargs)
    hub = {key: value for key, value in kwargs.items() if key in (*_HUB, "gguf_file")}
    return AutoConfig.from_pretrained(name, **hub)


def load_tokenizer(
    hf_model: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that was named, or the model's own."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    source = tokenizer or (hf_model if isinstance(hf_model, str) else hf_model.name_or_path)
    name, kwargs = locate(source, model_kwargs)
    hub = {key: value for key, value in kwargs.items() if key in (*_HUB, "gguf_file")}
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name, **hub))


def locate(hf_model: str, model_kwargs: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` needs to find a model: a folder or hub id, and keyword arguments."""
    kwargs = dict(model_kwargs or {})
    if hf_model == "demo:lm":
        from deeplens_lightning.demo import lm_folder

        return str(lm_folder()), kwargs
    path = Path(hf_model)
    if path.suffix == ".gguf":
        return str(path.parent), kwargs | {"gguf_file": path.name}
    return hf_model, kwargs


class _Captured(BaseException):
    """Raised in the last hook to leave the forward pass; never escapes `FrozenModel.activations`."""


class FrozenModel:
    """A language model that only answers `activations`; no `nn.Module`, so nothing trains, saves or moves it."""

    def __init__(
        self,
        base: nn.Module,
        config: PretrainedConfig,
        hook_points: Sequence[HookPoint],
        isolation: Isolation,
        device: torch.device,
    ) -> None:
        self.hook_points = tuple(hook_points)
        self.config = config
        self.isolation: Isolation = isolation
        self.device = device
        self._base: nn.Module | None = base
        self._lock = threading.Lock()
        rows = self.activations(torch.zeros(1, 2, dtype=torch.int64))
        self.dtypes = {name: x.dtype for name, x in rows.items()}
        self.identity = {"architecture": type(base).__name__, "weights": _digest(base)}

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
        """Load what the deepest hook point needs, and find out how to keep segments apart."""
        if isinstance(hf_model, PreTrainedModel):
            base = hf_model.base_model
            device = hf_model.device
            config = hf_model.config
        else:
            name, kwargs = locate(hf_model, model_kwargs)
            config = load_config(hf_model, model_kwargs)
            layers = [point.layer for point in hook_points]
            if None not in layers:
                kwargs["num_hidden_layers"] = max(cast(list[int], layers)) + 1
            with torch.random.fork_rng(devices=[]):
                base = AutoModel.from_pretrained(name, **kwargs)
            base.eval().requires_grad_(False)
            if "device_map" not in kwargs:
                base.to(torch.device(device))
            device = base.device
        return cls(
            base, config, hook_points, "packed" if isolation == "auto" else isolation, torch.device(device)
        )

    @torch.no_grad()
    def activations(
        self, tokens: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the model up to the deepest hook point.

        Args:
            tokens: int64 `(B, T)`.
            position_ids: int64 `(B, T)`, see `Isolation`.
            attention_mask: int64 or bool `(B, T)`, see `Isolation`.

        Returns:
            `(B, T, d_in)` by canonical name, on the model's device, in the model's dtype.
        """
        if self._base is None:
            raise RuntimeError("this model was closed; load it again")
        inputs = {"input_ids": tokens, "position_ids": position_ids, "attention_mask": attention_mask}
        given = {key: value.to(self.device) for key, value in inputs.items() if value is not None}
        with self._lock, _evaluating(self._base), ExitStack() as stack:
            captured = _capture(stack, self._base, self.hook_points, (tokens.shape[0], tokens.shape[1]))
            for kind in {"cpu", self.device.type}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            try:
                self._base(**given, use_cache=False)
            except _Captured:
                pass
        return {point.name: captured[point.name] for point in self.hook_points}

    def close(self) -> None:
        """Let go of the model; one that was handed in is as it was."""
        self._base = None


def _capture(
    stack: ExitStack, base: nn.Module, hook_points: Sequence[HookPoint], shape: tuple[int, int]
) -> dict[str, Tensor]:
    captured: dict[str, Tensor] = {}

    def keep(point: HookPoint, value: Any) -> None:
        x = value if isinstance(value, Tensor) else value[0]
        x = (x * point.scale if point.scale != 1 else x).reshape(*shape, -1)
        last = len(captured) + 1 == len(hook_points)
        captured[point.name] = x if last else x.clone()  # later layers may add to it in place
        if last:
            raise _Captured

    def before(point: HookPoint) -> Any:
        return lambda _, args, kwargs: keep(point, args[0] if args else kwargs["hidden_states"])

    def after(point: HookPoint) -> Any:
        return lambda _, args, output: keep(point, output)

    for point in hook_points:
        module = base.get_submodule(point.module)
        if point.side == "in":
            handle = module.register_forward_pre_hook(before(point), with_kwargs=True)
        else:
            handle = module.register_forward_hook(after(point))
        stack.callback(handle.remove)
    return captured


@contextmanager
def _evaluating(base: nn.Module) -> Iterator[None]:
    training = [module for module in base.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _digest(base: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 16)][:32].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
