"""Copy the first layers of a model in float32, so that small errors can be told from rounding.

In: a forward pass in lower precision. Out: a forward pass in float32 of as few layers as show every kind of layer that
the hook points need, with hook points of the same kinds. The model itself is only read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deeplens_lightning.model.capture import HookedForward
from deeplens_lightning.model.cpu_kernels import has_replaced_forward
from deeplens_lightning.model.hf_config import has_setting, setting
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.layer_map import ModulePlace, layer_places
from deeplens_lightning.model.pretrained import cut
from deeplens_lightning.model.tracing import Structure, Trace, trace
from deeplens_lightning.model.wrappers import uncompiled, unwrapped

_LEAST_LAYERS = 2
"""Number of layers that are copied where all are alike."""
_LARGE_EMBEDDING = 2**15
"""Rows from which on an embedding is shared with the model in place of being copied."""

_IN_FLOAT32 = ("eager", "sdpa", "flex_attention")
"""Attention implementations that run in float32."""


def is_exact(base: PreTrainedModel) -> bool:
    """Whether a model computes in float32: all weights are plain float32 tensors, and matrix products are not TF32."""
    wide = (torch.float32, torch.float64)
    plain = all(x.dtype in wide and type(x.data) is Tensor for x in base.parameters())
    reduced = base.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return plain and not reduced and setting(base.config, "quantization_config") is None


def exact_forward(forward: HookedForward, model: PretrainedConfig | nn.Module) -> HookedForward:
    """A forward pass in float32 of the first layers of a model.

    They have the weights of the model where these can be copied. Quantised and offloaded weights cannot: the layers
    then have random weights, and show what the architecture does. Attention that is made for lower precision alone
    (FlashAttention) is replaced by "sdpa". The layers run on the model's GPU if that has twice the memory that their
    weights need, else on the CPU; in float64 where the process lets float32 products be rounded to TF32.

    Args:
        forward: the model.
        model: the whole model if it was given loaded, else its configuration.

    Raises:
        RuntimeError: the copy does not run.
        TypeError: the model cannot be copied.
        ValueError: the copy does not run.
    """
    traced = trace(model)
    kinds = _layer_kinds(model if isinstance(model, PretrainedConfig) else unwrapped(model).config, traced)
    layers = [point.layer for point in forward.hook_points]
    needed = kinds if None in layers else kinds[: max(layer for layer in layers if layer is not None) + 1]
    depth = next(
        n
        for n in range(1, len(needed) + 1)
        if n >= _LEAST_LAYERS or n == len(needed)
        if needed[n - 1] == needed[-1] and set(needed[:n]) == set(needed)
    )
    if _can_be_copied(forward.base):
        with forward.lock, uncompiled(forward.base):
            base = _copied(forward.base, traced, depth)
    else:
        base = _random(model, setting(forward.base.config, "_attn_implementation"), depth)
    points = _moved(forward.hook_points, traced, kinds, depth)
    exact = HookedForward(base, points, fast_kernels=False)
    exact(torch.zeros(1, 1, dtype=torch.int64))
    return exact


def _layer_kinds(config: PretrainedConfig, traced: Trace) -> list[tuple[Any, ...]]:
    """What each layer computes: its operations, and its entries in lists of the configuration such as `layer_types`."""
    settings = config.get_text_config().to_dict()
    lists = [value for value in settings.values() if isinstance(value, list) and len(value) == traced.depth]
    return [(made, *(str(value[i]) for value in lists)) for i, made in enumerate(traced.operations[1:])]


def _moved(
    points: Sequence[HookPoint], traced: Trace, kinds: Sequence[tuple[Any, ...]], depth: int
) -> list[HookPoint]:
    """Hook points of the same kinds in the first `depth` layers; one in the last of these for those after all layers."""
    moved: dict[tuple[str, str], HookPoint] = {}
    for point in points:
        if point.layer is None:
            places = [layer_places(traced, depth - 1)[kind] for kind in ("resid_post", "mlp_in", "attn_z")]
            place = next(place for place in places if isinstance(place, ModulePlace))
            new = replace(point, module=place.module, side=place.side, layer=depth - 1, d_in=place.d_in)
        elif point.layer < depth:
            new = point
        else:
            index = max(i for i in range(depth) if kinds[i] == kinds[point.layer])
            path = re.sub(rf"^{re.escape(traced.layers)}\.\d+", f"{traced.layers}.{index}", point.module)
            new = replace(point, module=path, layer=index)
        moved.setdefault((new.module, new.side), replace(new, name=f"{new.module}:{new.side}"))
    return list(moved.values())


def _can_be_copied(base: PreTrainedModel) -> bool:
    """Whether the weights are plain tensors in memory, and no module has another `forward` than its class."""
    plain = all(x.is_floating_point() and type(x.data) is Tensor and not x.is_meta for x in base.parameters())
    quantised = setting(base.config, "quantization_config") is not None
    return plain and not quantised and not any(map(has_replaced_forward, base.modules()))


def _copied(base: PreTrainedModel, traced: Trace, depth: int) -> PreTrainedModel:
    """A copy with the weights of the first `depth` layers in float32.

    Weights of modules that do not run, such as a vision tower, and of large embeddings stay as they are and are
    shared; the output of such an embedding is made float32.
    """
    dropped = {f"{traced.layers}.{index}" for index in range(depth, traced.depth)}
    ran = {call.path for call in traced.calls}
    dtype = torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    memo: dict[int, Any] = {}
    kept: list[tuple[nn.Module, bool]] = []  # modules of the copy, and whether their weights are made float32
    for path, module in base.named_modules():
        above = {path[: match.start()] for match in re.finditer(r"\.|$", path)}  # itself and what holds it
        if path in dropped:
            memo[id(module)] = nn.Identity()
        elif not above & dropped:
            large = isinstance(module, nn.Embedding) and module.num_embeddings >= _LARGE_EMBEDDING
            kept.append((module, (not path or bool(above & ran)) and not large))
    size = sum(x.numel() for module, exact in kept if exact for x in module.parameters(recurse=False))
    device = _device(base, size * dtype.itemsize)
    for module, exact in kept:
        for x in module.parameters(recurse=False):
            moved = x.detach().to(device, dtype if exact else x.dtype)
            memo[id(x)] = nn.Parameter(moved, requires_grad=False)
        for buffer in module.buffers(recurse=False):
            kind = dtype if buffer.is_floating_point() else buffer.dtype
            memo[id(buffer)] = buffer.detach().to(device, kind, copy=True)
    with torch.no_grad():
        copied: PreTrainedModel = copy.deepcopy(base, memo)
    del cast(nn.ModuleList, copied.get_submodule(traced.layers))[depth:]
    for module in copied.modules():
        if isinstance(module, nn.Embedding) and module.weight.dtype != dtype:
            module.register_forward_hook(lambda _, __, output: output.to(dtype))
    if setting(copied.config, "_attn_implementation") not in _IN_FLOAT32:
        copied.set_attn_implementation("sdpa" if copied._supports_sdpa else "eager")
    if dtype == torch.float64:
        copied.set_experts_implementation("eager")  # the others have no kernel for it
    return copied


def _device(base: PreTrainedModel, size: int) -> torch.device:
    """The model's GPU if it has twice `size` bytes free, else the CPU."""
    if base.device.type == "cuda" and torch.cuda.mem_get_info(base.device)[0] > 2 * size:
        return base.device
    return torch.device("cpu")


def _random(model: PretrainedConfig | nn.Module, attention: str, depth: int) -> PreTrainedModel:
    """The first `depth` layers with random weights from a fixed seed, on the CPU."""
    whole = Structure.of(model)
    short = cut(whole.config, [depth - 1])
    if has_setting(short, "quantization_config"):
        del short.quantization_config
    structure = replace(whole, config=short, text=short.to_json_string(use_diff=False))
    made = structure.build("cpu", attention if attention in _IN_FLOAT32 else "sdpa").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for x in made.parameters():
        if x.ndim > 1:
            x.normal_(0, x.shape[-1] ** -0.5, generator=generator)
        else:
            x.uniform_(0.5, 1.5, generator=generator)
    return made
