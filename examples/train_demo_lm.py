"""Train `demo:lm`, the small GPT-2 model that is part of the package, on docstrings of installed packages.

    python examples/train_demo_lm.py --out deeplens_lightning/demo/lm

The model is not trained on the documents that the data module holds out. At the end the script prints the next-token
loss on these documents, the unigram entropy of the same text, and the ratio of the two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from deeplens_lightning.demo.docs import demo_documents
from deeplens_lightning.text.documents import document_hash, is_heldout

VAL_FRACTION = 0.05
END = "<|endoftext|>"


def train_tokenizer(documents: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=context
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str], end: int) -> Tensor:
    """Concatenate the tokens of all documents, with an end token after each: int64 `(tokens,)`."""
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return torch.from_numpy(np.concatenate([[*ids, end] for ids in encoded]).astype(np.int64))


def optimizers(model: GPT2LMHeadModel, lr: float) -> list[torch.optim.Optimizer]:
    """Make the optimizers: Muon for the weight matrices inside the transformer blocks, AdamW for all other weights."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


@torch.no_grad()
def mean_loss(model: GPT2LMHeadModel, stream: Tensor, context: int) -> float:
    """Mean next-token loss in nats over windows of `context` tokens."""
    model.eval()
    windows = stream[: len(stream) // context * context].view(-1, context)
    losses = [model(batch, labels=batch, use_cache=False).loss.item() for batch in windows.split(32)[:-1]]
    model.train()
    return float(np.mean(losses))


def unigram_entropy(stream: Tensor, vocab_size: int) -> float:
    """Entropy in nats of the token frequencies in a text, given as token ids `(tokens,)`."""
    p = torch.bincount(stream, minlength=vocab_size).double()
    p = p[p > 0] / p.sum()
    return float(-(p * p.log()).sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=8e6, help="tokens to train on")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="windows of `context` tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    arguments = parser.parse_args()

    documents = demo_documents()
    train = [text for text in documents if not is_heldout(document_hash(text), VAL_FRACTION)]
    heldout = [text for text in documents if is_heldout(document_hash(text), VAL_FRACTION)]
    tokenizer = train_tokenizer(train, arguments.vocabulary, arguments.context)
    end = tokenizer.convert_tokens_to_ids(END)
    stream, heldout_stream = (token_stream(tokenizer, part, end) for part in (train, heldout))
    entropy = unigram_entropy(heldout_stream, arguments.vocabulary)
    print(
        f"{len(train)} documents, {len(stream):,} tokens; held out {len(heldout)}, {len(heldout_stream):,} tokens"
    )

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=arguments.vocabulary,
        n_positions=arguments.context,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.width // 32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config).train()
    tokenizer.save_pretrained(arguments.out)
    steps = int(arguments.tokens / (arguments.batch * arguments.context))
    optimizer_list = optimizers(model, arguments.lr)
    rng = np.random.default_rng(0)
    starts = np.concatenate(  # each pass over the text cuts it into windows from another random offset
        [
            rng.permutation(
                np.arange(rng.integers(arguments.context), len(stream) - arguments.context, arguments.context)
            )
            for _ in range(1 + steps * arguments.batch * arguments.context // len(stream))
        ]
    )
    offsets = torch.arange(arguments.context)
    progress = tqdm(range(steps), unit_scale=arguments.batch * arguments.context, unit="tok", mininterval=10)
    for step in progress:
        share = min(1.0, (step + 1) / 50) * min(
            1.0, (steps - step) / (0.6 * steps)
        )  # warm-up, flat, linear decay
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * share
        first = torch.from_numpy(starts[step * arguments.batch : (step + 1) * arguments.batch])
        batch = stream[first[:, None] + offsets]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_list:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 49:
            progress.set_postfix(loss=f"{loss.item():.3f}", of_entropy=f"{loss.item() / entropy:.1%}")
        if step % 500 == 499 or step == steps - 1:
            model.save_pretrained(arguments.out)
    model = GPT2LMHeadModel.from_pretrained(arguments.out)
    model.half().save_pretrained(arguments.out)  # weights are stored in half precision to keep the file small
    model.config.dtype = torch.float32  # and computed with in single precision
    model.config.save_pretrained(arguments.out)
    shipped = GPT2LMHeadModel.from_pretrained(arguments.out)
    assert shipped.dtype == torch.float32
    loss = mean_loss(shipped, heldout_stream, arguments.context)
    print(f"held-out loss {loss:.4f} nats, unigram entropy {entropy:.4f} nats, ratio {loss / entropy:.2%}")


if __name__ == "__main__":
    main()
