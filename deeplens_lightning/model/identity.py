"""Identify a loaded model, so that a checkpoint or cache made with other weights is detected."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from deeplens_lightning.model.hf_config import setting
from deeplens_lightning.model.hook_points import HookPoint


def identify(
    base: PreTrainedModel,
    config: PretrainedConfig,
    *,
    name: str,
    layers: str,
    hook_points: Sequence[HookPoint],
) -> dict[str, str]:
    """Name, revision, architecture, dtype and a digest of the weights of a model, as strings.

    Args:
        base: the base model.
        config: configuration of the whole model.
        name: what the user called the model.
        layers: path of the list of layers.
        hook_points: weights that no hook point depends on do not count.
    """
    deepest = [point.layer for point in hook_points]
    cut = None if None in deepest else max(layer for layer in deepest if layer is not None)
    return {
        "name": name,
        "revision": str(setting(config, "_commit_hash") or ""),
        "architecture": type(base).__name__,
        "dtype": str(base.dtype),
        "weights": _digest(base, layers, cut),
    }


def _digest(base: nn.Module, layers: str, cut: int | None) -> str:
    """SHA-256 of the names, shapes and a few values of the parameters up to layer `cut`; of all if it is None."""
    digest = hashlib.sha256()
    for name, parameter in base.named_parameters():
        rest = name.removeprefix(f"{layers}.")
        beyond = cut is not None and rest != name and int(rest.partition(".")[0]) > cut
        if beyond or name.startswith("pooler"):
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":  # where accelerate offloads weights to disk or RAM
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 16)][:32].float().cpu()
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
