"""What determines the rows of a live stream: one list, for the fingerprint in checkpoints and the manifest of caches.

In: the frozen model and the text stage. Out: JSON-like values. A tokenizer is identified by its content and not by its
name, so that the same files in another folder are the same tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from deeplens_lightning.model.frozen import FrozenModel
from deeplens_lightning.text.pipeline import TextStage

ABSENT = "none"
"""Digest of a tokenizer or a chat template that does not exist."""


def row_identity(
    model: FrozenModel, text: TextStage, *, inference_batch_size: int, compiled: bool
) -> dict[str, Any]:
    """List what determines the rows, as in the `config` of a cache's manifest.

    Args:
        model: the frozen model.
        text: the text of any split.
        inference_batch_size: blocks per model batch.
        compiled: whether the model runs under `torch.compile`.

    Returns:
        JSON-like values by name. An entry that is added here is in checkpoints and caches alike; those of earlier
        releases lack it, so add its name to `shards.format.ADDED_ENTRIES` too.
    """
    how = text.packing
    return {
        "model": model.identity,
        "dataset": text.documents.source.identity,
        "packing": {
            "seq_length": how.seq_length,
            "prefix": list(how.prefix),
            "suffix": list(how.suffix),
            "excluded": list(how.excluded),
            "drop_first_n": how.drop_first_n,
            "inference_batch_size": inference_batch_size,
            "isolation": model.isolation,
        },
        "tokenizer": tokenizer_digest(text.tokenizer),
        "chat_template": chat_template_digest(text.tokenizer),
        "attention": str(model.base.config._attn_implementation),
        "compile": compiled,
    }


def named_strings(identity: Mapping[str, Any]) -> dict[str, str]:
    """Convert what `row_identity` lists to names and strings, as in the fingerprint of a checkpoint."""
    packing = dict(identity["packing"])
    prefix, suffix, excluded = (tuple(packing.pop(name)) for name in ("prefix", "suffix", "excluded"))
    others = {name: value for name, value in identity.items() if name not in ("model", "dataset", "packing")}
    return {
        **{f"model {name}": value for name, value in identity["model"].items()},
        **identity["dataset"],
        "special tokens": f"{prefix} {suffix}, excluded {excluded}",
        **{name: str(value) for name, value in (packing | others).items()},
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """SHA-256 of what determines the token ids of a text, in hexadecimal; "none" without a tokenizer.

    Truncation and padding do not count: a fast tokenizer keeps those of its last call.
    """
    if tokenizer is None:
        return ABSENT
    digest = sha256()
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        digest.update(json.dumps(content, sort_keys=True).encode())
    else:
        flags = {name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, bool)}
        content = [type(tokenizer).__name__, tokenizer.get_vocab(), flags]
        digest.update(json.dumps(content, sort_keys=True).encode())
        with TemporaryDirectory() as folder:
            tokenizer.save_vocabulary(folder)  # merges and SentencePiece models too
            for path in sorted(Path(folder).iterdir()):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def chat_template_digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """SHA-256 of a tokenizer's chat template, or templates by name, in hexadecimal; "none" if it has none."""
    if tokenizer is None or not tokenizer.chat_template:
        return ABSENT
    return sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()
