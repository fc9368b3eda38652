"""Tiny random models on disk, each with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.texts import texts

END = "<|endoftext|>"
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2", "gemma")


def save_model(
    folder: Path,
    model_type: str = "llama",
    *,
    width: int = 32,
    layers: int = 3,
    positions: int = 256,
    bos: bool = False,
    **changes: Any,
) -> Path:
    """Save a random model with a vocabulary of 600 tokens; return its folder.

    Args:
        folder: where it is saved.
        model_type: Transformers' name of the architecture.
        width: the hidden size; the MLP is twice as wide, in GPT-2 four times.
        layers: the number of layers.
        positions: the longest sequence that the model accepts.
        bos: let the tokenizer begin each text with `<|endoftext|>`.
        changes: settings of the configuration that differ.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts(200, 900), vocab_size=600, special_tokens=[END], show_progress=False)
    if bos:
        bpe._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END} $A", special_tokens=[(END, 0)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=600,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        intermediate_size=2 * width,
        max_position_embeddings=positions,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config.update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder
