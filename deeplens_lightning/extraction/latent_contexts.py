"""`top_contexts`: the text on which chosen latents of a trained SAE are most active.

In: an SAE, and a data module that computes activations from text or reads them from shards. Out: the strongest contexts
of each latent, with the latent's activation on every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deeplens_lightning.callbacks.context_search import FoundContexts, search
from deeplens_lightning.callbacks.sae_view import require_sae
from deeplens_lightning.callbacks.support import evaluation_mode
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.model.pretrained import load_tokenizer
from deeplens_lightning.sae import Dictionary
from deeplens_lightning.shards.shard_stream import ShardStream
from deeplens_lightning.stream.cached_hook_points import bare_hook
from deeplens_lightning.stream.live_activations import LiveActivations

ROWS = 200_000
"""Rows that are searched by default."""
_READ = 4096


def top_contexts(
    module: nn.Module,
    data: ActivationDataModule,
    latents: int | Sequence[int],
    *,
    rows: int = ROWS,
    keep: int = 8,
    before: int = 24,
    after: int = 8,
    sae: str | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
) -> FoundContexts:
    """Find the text on which chosen latents of a trained SAE are most active; `print` shows the result.

    The rows of all documents are searched in order, held-out ones included: computed from text of any kind, streamed
    datasets too, or read from shards. Rows above the norm limits of the data module are not searched.

    Args:
        module: the trained SAE, or any module with `encode` and `decode` on raw activations.
        data: where rows come from.
        latents: numbers of the latents, or how many to choose at random.
        rows: largest number of rows to search, at least 1.
        keep: number of contexts of each latent, at least 1.
        before: number of tokens to show before the one on which the latent is active, at least 0.
        after: number of tokens to show after it, at least 0.
        sae: name of one SAE of a grid; default the first.
        tokenizer: turns token ids of shards into text: hub id, folder or a loaded tokenizer; default that of the model
            whose name the cache records.

    Returns:
        The contexts of each latent in its field `latents`, and the number of rows searched.

    Raises:
        ValueError: a number out of its range, a latent that the SAE does not have, another hook point than the SAE was
            trained on, or rows whose tokens are unknown.
        TypeError: the module has no `encode` or no `decode`.
    """
    if rows < 1 or keep < 1 or before < 0 or after < 0 or latents in (0, []):
        raise ValueError(
            f"latents={latents}, rows={rows} and keep={keep} must be at least 1, before={before} and after={after} at "
            "least 0"
        )
    view = require_sae(module, data.hook_names, "top_contexts", sae)
    if isinstance(view.module, Dictionary):
        trained_on = view.module.trained_on.get("hook_name", "")
        if trained_on and trained_on != ",".join(view.reads):
            raise ValueError(
                f"the SAE was trained on {trained_on}, and the data module serves {', '.join(view.reads)}: give it this "
                "hook point as layer= and hook="
            )
    opened_here = data.serving.opened is None
    try:
        if opened_here:
            data.setup()
        if tokenizer is None and data.tokenizer is None and data.hf_model is not None:
            tokenizer = load_tokenizer(data.hf_model, None, data.model_kwargs)
        elif isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        with evaluation_mode(module):
            return search(
                view,
                _ordered_rows(data, rows),
                latents,
                keep=keep,
                before=before,
                after=after,
                tokenizer=tokenizer or data.tokenizer,
            )
    finally:
        if opened_here:
            data.teardown()


def _ordered_rows(data: ActivationDataModule, most: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Up to `most` raw rows of all documents with their provenance, in the order of the text or of the cache."""
    opened = data.serving.activations
    if not isinstance(opened, LiveActivations):
        options = data.settings.cache_options
        stream = ShardStream(
            opened.settings.catalog,
            batch_size=_READ,
            shuffle="none",
            split="all",
            hook=bare_hook(opened.settings.given),
            only=opened.settings.only,
            checksums=options.checksums,
            cache_dir=options.dir,
            cache_bytes=options.bytes,
            timeout=options.timeout,
        )
        with closing(stream):
            for batch in stream.batches(stream.start(0), 0):
                yield {name: x[:most] for name, x in batch.rows.items()}, batch.provenance[:most]
                most -= len(batch.provenance)
                if most <= 0:
                    return
        return
    limits = data.serving.measured().max_norms
    for computed in opened.extraction(most):
        fine = torch.ones(len(computed.provenance), dtype=torch.bool)
        for name, limit in limits.items():
            fine &= (computed.rows[name].float().norm(dim=1) <= limit).cpu()
        yield {name: x[fine.to(x.device)] for name, x in computed.rows.items()}, computed.provenance[fine]
