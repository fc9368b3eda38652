"""Load a language model up to its deepest hook point and read activations from it.

In: a hub id, folder, GGUF file, `demo:lm` or loaded model, and hook points. Out: activations
`(batch, sequence, d_in)` by hook point. The weights are frozen; a model that is given loaded is left unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from deeplens_lightning.model.capture import HookedForward
from deeplens_lightning.model.compilation import compiled
from deeplens_lightning.model.exact_copy import exact_forward, is_exact
from deeplens_lightning.model.hook_points import HookPoint
from deeplens_lightning.model.identity import identify
from deeplens_lightning.model.isolation import MODES, choose
from deeplens_lightning.model.lengths import lengths_of
from deeplens_lightning.model.pretrained import load_base, load_config, max_positions
from deeplens_lightning.model.tracing import base_of, trace
from deeplens_lightning.model.wrappers import unwrapped
from deeplens_lightning.options import Isolation

logger = logging.getLogger(__name__)

_DEFAULT_BLOCK = 1024
"""Positions of a block that the probe assumes if `seq_length` is not given."""

LONGEST_PROBED = 8192
"""Longest length in tokens of a model, such as that of a window, that the probe goes past: longer probes are slow."""


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
        hf_model: str | nn.Module,
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
            hf_model: hub id, folder, `.gguf` file, `demo:lm`, or a loaded model, which may be wrapped by
                `torch.compile` or PEFT (the rows include adapters in its layers). A loaded model stays on its device
                and keeps all its layers; hooks and flags are set during a call only.
            hook_points: from `resolve`, of the same model.
            device: where a model that is loaded here goes, unless `model_kwargs` has a `device_map`.
            model_kwargs: keyword arguments for `from_pretrained`: dtype, device_map, quantization_config,
                attn_implementation, revision, trust_remote_code (off unless given), or a setting of the
                configuration.
            compile_model: run the parts between hook points under `torch.compile`.
            isolation: how segments are kept apart; `auto` probes the model.
            seq_length: positions of a block, and the longest segment, in tokens. The probe goes past the lengths in
                the configuration (of windows, chunks, RoPE scaling) that such blocks go past. If it is not given,
                the probe assumes 1024, or the model's positions if those are fewer.

        Raises:
            ValueError: no hook points are given, `seq_length` exceeds the model's positions, weights are missing, a
                quantised model cannot run on the device, or in every kind of model batch rows differ from those of
                the segment alone.
        """
        if not hook_points:
            raise ValueError("no hook points are given; make them with resolve(config, layer, hook)")
        model: PretrainedConfig | PreTrainedModel
        if isinstance(hf_model, str):
            model, name = load_config(hf_model, model_kwargs), hf_model
            config = model
        else:
            model = unwrapped(hf_model)
            base, config, name = base_of(model), model.config, str(model.name_or_path)
        limit = max_positions(model)
        if seq_length is not None and limit is not None and seq_length > limit:
            raise ValueError(
                f"seq_length={seq_length} exceeds the {limit} positions of {name}; give at most {limit}"
            )
        if isinstance(hf_model, str):
            base = load_base(hf_model, config, hook_points, torch.device(device), model_kwargs)
        layers = trace(model).layers
        forward = HookedForward(base, hook_points, fast_kernels=not compile_model)
        tokens = torch.zeros(1, min(2, limit or 2), dtype=torch.int64)
        dtypes = {key: x.dtype for key, x in forward(tokens).items()}
        if isolation == "auto":
            block = seq_length or min(limit or _DEFAULT_BLOCK, _DEFAULT_BLOCK)
            isolation = _probed_isolation(forward, model, block)
            logger.info("segments are kept apart by isolation=%r", isolation)
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

    @contextmanager
    def exclusive(self) -> Iterator[PreTrainedModel]:
        """Hold the lock of the model, for code that itself runs a model that was given loaded.

        For example::

            with data.model.exclusive():
                loss = language_model(tokens, labels=tokens).loss

        Calls of `activations` in other threads wait until the context ends. So none of their hooks is on the model,
        and what this thread puts on it (hooks, evaluation mode) does not change their rows. There is one lock for a
        base model: all that read it share the lock, whatever head or wrapper it was given in. The thread that holds
        it may take it again, and may call `activations`.

        Yields:
            The base model.

        Raises:
            RuntimeError: the model was closed.
        """
        forward = self._open_forward()
        with forward.lock:
            yield forward.base

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


def _probed_isolation(forward: HookedForward, model: PretrainedConfig | nn.Module, block: int) -> Isolation:
    """The isolation that `isolation.choose` finds for blocks, and segments, of at most `block` tokens.

    A model in lower precision is probed in float32 first, on a copy of its first layers, because its rounding is as
    large as a leak; the model itself then has to agree up to rounding.
    """
    config = model if isinstance(model, PretrainedConfig) else unwrapped(model).config
    lengths = lengths_of(config, block)
    modes = MODES
    for name, length in lengths:
        if length > LONGEST_PROBED:
            logger.warning(
                "only segments of equal length share a model batch: blocks of %d tokens reach %s=%d of the model, "
                "and lengths above %d are not probed; to allow packed batches, set model_options.isolation or a smaller "
                "seq_length",
                block,
                name,
                length,
                LONGEST_PROBED,
            )
            modes = ("equal",)
    probe = partial(
        choose,
        vocab_size=min(forward.vocabulary, config.get_text_config().vocab_size),
        block=block,
        lengths=[length for _, length in lengths if length <= LONGEST_PROBED],
    )
    if is_exact(forward.base):
        return probe(forward, modes=modes)
    try:
        exact = exact_forward(forward, model)
    except Exception as error:  # noqa: BLE001  whatever a copy of an unusual model raises: it is probed strictly then
        logger.warning(
            "only segments of equal length share a model batch, because no part of the model could be probed in "
            "float32 (%s); to allow packed batches, load it in float32, or set model_options.isolation",
            error,
        )
        modes = ("equal",)
    else:
        modes = modes[modes.index(probe(exact, modes=modes)) :]
    return probe(forward, modes=modes, exact=False)
