"""Measure the speed of reading cached activations in globally shuffled order, compared with other readers.

    python examples/benchmarks/reading.py --out reading.json

- `mapped`: gather the same number of random rows from one plain memory-mapped tensor: the limit of this machine;
- `ram`: the same from a tensor in memory;
- `ours`: `ShardStream` on memory-mapped shards;
- `datamodule`: the same shards through `ActivationDataModule(shards=...).train_dataloader()`;
- `deeplens`: a shuffling `DataLoader` over a `TensorDataset` in memory, row by row, as in DeepLens;
- `saelens`: SAELens's store on its own cache (Arrow), left out if `sae-lens` is not installed.

All readers read the same rows and take turns in one process. The table shows median rates and the medians over rounds of
two ratios: the rate of a reader to that of `mapped`, and the rate of `datamodule` to that of a reader. Provenance is not
asked for. The files are in the page cache, because they were just written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.options import BufferOptions, CacheOptions
from deeplens_lightning.shards import Manifest, Rows, ShardStream, ShardWriter

HOOK = "layers.0.mlp_out"
CONTEXT = 128


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--shard-mb", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=8, help="batches per reader and round")
    parser.add_argument("--folder", help="where to write the caches; default a temporary folder")
    parser.add_argument("--out", help="JSON file for the figures")
    return parser.parse_args(argv)


def from_mapped(rows: Tensor, args: argparse.Namespace, file: Path) -> Iterator[Tensor]:
    """Random rows of one memory-mapped tensor."""
    torch.save(rows, file)
    return from_ram(torch.load(file, mmap=True, weights_only=True), args)


def from_ram(rows: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield rows.index_select(0, torch.randint(len(rows), (args.batch_size,), generator=generator))


def from_shards(rows: Tensor, args: argparse.Namespace, folder: Path) -> Iterator[Tensor]:
    manifest = Manifest(hook_points={HOOK: Rows(d_in=args.d_in, dtype=args.dtype)})
    with ShardWriter(folder, manifest, shard_bytes=args.shard_mb * 10**6) as writer:
        for first in range(0, len(rows), 8192):
            part = rows[first : first + 8192]
            number = torch.arange(first, first + len(part))
            provenance = torch.stack([number // 300, number // 300, number % 300, number % 1000], dim=1)
            writer.append({HOOK: part}, provenance, source=None, first_row=first)
        writer.finish()
    stream = ShardStream(folder, batch_size=args.batch_size, shuffle="global", drop_last=True)
    for epoch in count():
        for batch in stream.batches(stream.start(epoch), 0):
            yield batch.rows[HOOK]


def from_data_module(args: argparse.Namespace, folder: Path) -> Iterator[Tensor]:
    """Batches of the training data loader, from the cache that `from_shards` wrote."""
    options = CacheOptions(shuffle="global")
    buffer = BufferOptions(dtype="auto")
    data = ActivationDataModule(
        shards=str(folder),
        batch_size=args.batch_size,
        val_fraction=0,
        cache_options=options,
        buffer_options=buffer,
    )
    data.setup("fit")
    while True:
        yield from data.train_dataloader()


def from_deeplens(rows: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    loader = DataLoader(TensorDataset(rows), batch_size=args.batch_size, shuffle=True, drop_last=True)
    while True:
        for [batch] in loader:
            yield batch


def from_saelens(rows: Tensor, args: argparse.Namespace, folder: Path) -> Iterator[Tensor]:
    """SAELens's store; it requires a model, so it gets a tiny one that never runs."""
    import datasets
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore
    from transformers import GPT2Config, GPT2LMHeadModel

    blocks = rows[: len(rows) // CONTEXT * CONTEXT].view(-1, CONTEXT, args.d_in)
    hook = "transformer.h.0.mlp"
    features = datasets.Features({hook: datasets.Array2D(tuple(blocks.shape[1:]), args.dtype)})
    datasets.Dataset.from_generator(
        lambda: ({hook: block.numpy()} for block in blocks), features=features, cache_dir=str(folder / "tmp")
    ).save_to_disk(folder / "arrow")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=CONTEXT, n_embd=4, n_layer=1, n_head=1))
    return ActivationsStore(
        model=HookedProxyLM(model, None, hook_names=[hook]),
        dataset=datasets.Dataset.from_dict({"tokens": [[1] * CONTEXT] * 8}),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=args.d_in,
        n_batches_in_buffer=16 * args.batch_size // CONTEXT,
        total_training_tokens=1,
        store_batch_size_prompts=32,
        train_batch_size_tokens=args.batch_size,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype=args.dtype,
        cached_activations_path=str(folder / "arrow"),
    )


def measure(contenders: dict[str, Iterator[Tensor]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Rows per second of each reader in each round; the reader that goes first changes from round to round."""
    names = list(contenders)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(-2, args.rounds):  # two rounds warm up
        turn = round_number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            begun = time.perf_counter()
            served = sum(len(next(contenders[name])) for _ in range(args.batches))
            if round_number >= 0:
                rates[name].append(served / (time.perf_counter() - begun))
    return rates


def run(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    dtype = getattr(torch, args.dtype)
    rows = torch.randn(args.rows, args.d_in, generator=torch.Generator().manual_seed(0)).to(dtype)
    contenders = {
        "mapped": from_mapped(rows, args, folder / "rows.pt"),
        "ram": from_ram(rows, args),
        "ours": from_shards(rows, args, folder / "shards"),
        "datamodule": from_data_module(args, folder / "shards"),
        "deeplens": from_deeplens(rows, args),
    }
    if importlib.util.find_spec("sae_lens") is None or args.dtype == "bfloat16":  # Arrow has no bfloat16
        print("saelens is left out")
    else:
        contenders["saelens"] = from_saelens(rows, args, folder)
    rates = measure(contenders, args)
    return {
        name: {
            "rows_per_s": median(values),
            "of_the_limit": median(one / limit for one, limit in zip(values, rates["mapped"], strict=True)),
            "datamodule_is_faster_by": median(
                ours / other for ours, other in zip(rates["datamodule"], values, strict=True)
            ),
        }
        for name, values in rates.items()
    }


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table = run(args, Path(folder))
    print(f"{'reading':12s} {'rows/s':>12s} {'of the limit':>13s} {'datamodule is faster by':>24s}")
    for name, line in table.items():
        print(
            f"{name:12s} {line['rows_per_s']:12,.0f} {line['of_the_limit']:13.2f} "
            f"{line['datamodule_is_faster_by']:23.2f}x"
        )
    if args.out:
        Path(args.out).write_text(json.dumps({"settings": vars(args), "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
