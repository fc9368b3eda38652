"""Load a language model up to its deepest hook point and read activations from it.

In: a hub id, folder, GGUF file, `demo:lm` or loaded model, and hook points. Out: activations
`(batch, sequence, d_in)` by hook point. The weights are frozen; a model that is given loaded is left unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from deeplens_lightning.model.capture import HookedForward
from deeplens_lightning.model.compilation import compiled
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.identity import identify
from deeplens_lightning.model.isolation import choose
from deeplens_lightning.model.pretrained import load_base, load_config, max_positions
from deeplens_lightning.model.rope import original_context
from deeplens_lightning.model.tracing import base_of, trace
from deeplens_lightning.options import Isolation

logger = logging.getLogger(__name__)

_LONGEST_DEFAULT_PROBE = 1024
"""Longest original RoPE context in tokens that is probed if `seq_length` is not given: longer probes are slow."""


class FrozenModel:
    """A language model that returns activations. Use `FrozenModel.load` to make one.

    It is not an `nn.Module`, so that an SAE with it as an attribute does not train, save or move its weights.

    Args:
        forward: the forward pass.
        config: configuration of the whole model, also if only some layers were loaded.
        isolation: how segments are kept apart.
        dtypes: activation dtype by hook point name.
        identity: strings that identify the model and its weights.
        compilation: a context that was entered, and that `close` leaves.

    Attributes:
        hook_points: what is read, in the order in which it was given.
        config: configuration of the whole model.
        isolation: how segments are kept apart: as given, or as the probe chose.
        device: device of the model and of the activations.
        dtypes: activation dtype by hook point name.
        identity: name, revision, architecture, dtype and a digest of the weights.
    """

    def __init__(
        self,
        forward: HookedForward,
        config: PretrainedConfig,
        *,
        isolation: Isolation,
        dtypes: dict[str, torch.dtype],
        identity: dict[str, str],
        compilation: ExitStack,
    ) -> None:
        self.hook_points = forward.hook_points
        self.config = config
        self.isolation = isolation
        self.device = forward.base.device
        self.dtypes = dtypes
        self.identity = identity
        self._forward: HookedForward | None = forward  # None after `close`
        self._compilation = compilation

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
        """Load the layers that the deepest hook point needs, and choose how segments share a model batch.

        Args:
            hf_model: hub id, folder, `.gguf` file, `demo:lm`, or a loaded model. A loaded model stays on its device
                and keeps all its layers; hooks and flags are set during a call only.
            hook_points: from `resolve`, of the same model.
            device: where a model that is loaded here goes, unless `model_kwargs` has a `device_map`.
            model_kwargs: keyword arguments for `from_pretrained`: dtype, device_map, quantization_config,
                attn_implementation, revision, trust_remote_code (off unless given), or a setting of the
                configuration.
            compile_model: run the parts between hook points under `torch.compile`.
            isolation: how segments are kept apart; `auto` probes the model.
            seq_length: the longest segment in tokens. If given, the probe reaches the lengths at which RoPE scaling
                depends on the sequence length only if such segments can occur.

        Raises:
            ValueError: no hook points are given, `seq_length` exceeds the model's positions, weights are missing, a
                quantised model cannot run on the device, or in every kind of model batch rows differ from those of
                the segment alone.
        """
        if not hook_points:
            raise ValueError("no hook points are given; make them with resolve(config, layer, hook)")
        if isinstance(hf_model, PreTrainedModel):
            base, config, name = base_of(hf_model), hf_model.config, str(hf_model.name_or_path)
        else:
            config, name = load_config(hf_model, model_kwargs), hf_model
        limit = max_positions(config if isinstance(hf_model, str) else hf_model)
        if seq_length is not None and limit is not None and seq_length > limit:
            raise ValueError(
                f"seq_length={seq_length} exceeds the {limit} positions of {name}; give at most {limit}"
            )
        if isinstance(hf_model, str):
            base = load_base(hf_model, config, hook_points, torch.device(device), model_kwargs)
        layers = trace(config if isinstance(hf_model, str) else hf_model).layers
        forward = HookedForward(base, hook_points, fast_kernels=not compile_model)
        dtypes = {key: x.dtype for key, x in forward(torch.zeros(1, 2, dtype=torch.int64)).items()}
        if isolation == "auto":
            isolation = _probed_isolation(forward, config, seq_length, limit)
        identity = identify(base, config, name=name, layers=layers, hook_points=hook_points)
        compilation = ExitStack()
        if compile_model:
            compilation.enter_context(compiled(base, layers, hook_points))
        return cls(
            forward,
            config,
            isolation=isolation,
            dtypes=dtypes,
            identity=identity,
            compilation=compilation,
        )

    @property
    def base(self) -> PreTrainedModel:
        """The base model.

        Raises:
            RuntimeError: the model was closed.
        """
        return self._open_forward().base

    def activations(
        self, tokens: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run the model up to the deepest hook point. `options.Isolation` says what to give besides tokens.

        One forward pass runs at a time. Gradients, autocast and dropout are off. The caller's grad and autocast
        modes, the global random state and the default dtype are neither used nor changed.

        Args:
            tokens: int64 `(B, T)`.
            position_ids: int64 `(B, T)`.
            attention_mask: int64 or bool `(B, T)`.

        Returns:
            `(B, T, d_in)` by canonical hook point name, in `dtypes`, on `device`.

        Raises:
            ValueError: a token id is beyond the embedding.
            RuntimeError: the model was closed.
        """
        return self._open_forward()(tokens, position_ids, attention_mask)

    def close(self) -> None:
        """Free the model when the present forward pass has ended; a loaded model that was given is left unchanged."""
        if self._forward is not None:
            with self._forward.lock:
                self._compilation.close()
                self._forward = None

    def _open_forward(self) -> HookedForward:
        if self._forward is None:
            raise RuntimeError("this model was closed; load it again with FrozenModel.load")
        return self._forward


def _probed_isolation(
    forward: HookedForward, config: PretrainedConfig, seq_length: int | None, limit: int | None
) -> Isolation:
    """The isolation that `isolation.choose` finds for segments of at most `seq_length` tokens."""
    original = original_context(config)
    reached = original and original < (seq_length or _LONGEST_DEFAULT_PROBE)
    mode = choose(
        forward,
        vocab_size=min(forward.vocabulary, config.get_text_config().vocab_size),
        max_length=seq_length or limit,
        original=original if reached else None,
    )
    logger.info("segments are kept apart by isolation=%r", mode)
    return mode
