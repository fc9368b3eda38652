"""Real English and tiny random models with a tokenizer of their own."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from deeplens_lightning import ActivationDataModule

END = "<|endoftext|>"
FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen2", "gemma")


def paragraphs(count: int) -> list[str]:
    """Real English of very different lengths, with empty and blank documents among it."""
    topics = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).split("\n\n")
    texts = ["\n\n".join(topics[i : i + 1 + i % 5]) for i in range(0, 5 * count, 5)][: count - 2]
    return [*texts[:3], "", *texts[3:7], " \n\t", *texts[7:]]


def save_tiny(folder: Path, model_type: str = "llama", width: int = 32, layers: int = 3) -> Path:
    """A random model of a family, 600 tokens, 256 positions."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(paragraphs(200), vocab_size=600, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)
    tokenizer.save_pretrained(folder)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": width // 4,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 256,
    }
    config = AutoConfig.for_model(
        model_type,
        vocab_size=600,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def small_stream(folder: str, **changes: Any) -> ActivationDataModule:
    """A stream of 64-row batches from 60 paragraphs, a fifth of the documents held out."""
    settings: dict[str, Any] = {
        "layer": 1,
        "hook": "mlp_out",
        "dataset_name": paragraphs(60),
        "seq_length": 32,
        "inference_batch_size": 4,
        "batch_size": 64,
        "buffer_size": 512,
        "val_fraction": 0.2,
        "val_rows": 200,
        "device": "cpu",
    }
    return ActivationDataModule(folder, **{**settings, **changes})
