"""Set up this library and SAELens with the same text and sizes: data modules or stores, SAEs, training steps, caches."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from deeplens_lightning import ActivationDataModule
from deeplens_lightning.demo import lm_folder
from deeplens_lightning.demo.docs import demo_documents
from deeplens_lightning.options import ModelOptions
from deeplens_lightning.sae import SparseAutoencoder


class Ours:
    """This library's SAE; `step` does what Lightning's loop does for one batch."""

    name = "deeplens_lightning"

    def __init__(
        self, args: argparse.Namespace, d_in: int, architecture: str, lr: float | None = None
    ) -> None:
        settings = {"k": args.k, "architecture": architecture, "lr": lr, "compile_step": args.compile_sae}
        self.sae = SparseAutoencoder(d_in, args.d_sae, **settings).to(args.device)
        self.sae.planned_tokens = args.planned_tokens
        self.sae.prepare(None)
        self.optimizer = torch.optim.Adam([self.sae.parameter_group()], fused=True)
        self.autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)
        self.steps = 0

    def step(self, batch: Tensor) -> None:
        self.sae.initialize_from(batch)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.sae.step(batch).loss
        loss.backward()
        self.sae.prepare_gradients()
        self.optimizer.step()
        self.sae.project()
        self.steps += 1

    def set_lr_factor(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.sae.lr * factor

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.sae(x), self.sae.encode(x)


class Theirs:
    """SAELens's trainer; `step` calls its public method for one batch."""

    name = "sae_lens"

    def __init__(self, args: argparse.Namespace, d_in: int, architecture: str, lr: float = 3e-4) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        name = architecture.replace("_", "")
        config = {"architecture": name, "d_in": d_in, "d_sae": args.d_sae, "k": args.k, "device": args.device}
        self.sae = TrainingSAE.from_dict(TrainingSAEConfig.from_dict(config).to_dict())
        total = args.planned_tokens or 10**9
        steps = total // args.batch_size
        settings = SAETrainerConfig(
            total_training_samples=total,
            train_batch_size_samples=args.batch_size,
            lr=lr,
            lr_end=lr / 10,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 5,
            device=args.device,
            autocast=args.bf16,
        )
        self.trainer = SAETrainer(settings, self.sae, iter(()))

    def step(self, batch: Tensor) -> None:
        self.trainer.step(batch)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.sae.encode(x)
        return self.sae.decode(latents), latents


def model_folder(model: str) -> str:
    return str(lm_folder()) if model == "demo:lm" else model


def our_data(args: argparse.Namespace, shards: str | None = None) -> ActivationDataModule:
    held_out = {"val_fraction": args.val_fraction, "val_rows": args.val_rows}
    if shards is not None:
        data = ActivationDataModule(shards=shards, batch_size=args.batch_size, device=args.device, **held_out)
    else:
        data = ActivationDataModule(
            args.model,
            layer=args.layer,
            hook=args.hook,
            dataset_name=args.dataset,
            seq_length=args.seq_length,
            inference_batch_size=args.inference_batch_size,
            batch_size=args.batch_size,
            buffer_size=args.buffer_batches * args.batch_size,
            **held_out,
            model_options=ModelOptions(compile=args.compile_model),
            device=args.device,
        )
    data.prepare_data()
    data.setup("fit")
    return data


def endless(data: ActivationDataModule) -> Iterator[Tensor]:
    while True:
        yield from data.train_dataloader()


def their_store(args: argparse.Namespace, d_in: int, cache: Path | None = None) -> Iterator[Tensor]:
    """Make SAELens's activation store for the same model, cut after the same layer and without its LM head."""
    import datasets
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(args.model)
    model = (
        AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=args.layer + 1).to(args.device).eval()
    )
    model.set_output_embeddings(nn.Identity())
    hook = args.saelens_hook
    if args.dataset == "demo:docs":
        text = datasets.Dataset.from_dict({"text": list(demo_documents())})
    else:
        text = datasets.load_dataset(args.dataset, split="train")
    proxy = HookedProxyLM(model, AutoTokenizer.from_pretrained(folder), hook_names=[hook])
    return ActivationsStore(
        model=proxy,
        dataset=text,
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=args.seq_length,
        d_in=d_in,
        n_batches_in_buffer=args.buffer_batches * args.batch_size // args.seq_length,
        total_training_tokens=1,
        store_batch_size_prompts=args.inference_batch_size,
        train_batch_size_tokens=args.batch_size,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device(args.device),
        dtype="float32",
        cached_activations_path=None if cache is None else str(cache),
    )


def write_caches(rows: Tensor, args: argparse.Namespace, folder: Path) -> tuple[str, Path]:
    """Write the same rows `(n, d_in)` as a bare tensor file for this library and as an Arrow cache for SAELens."""
    import datasets

    ours, theirs = folder / "rows.pt", folder / "arrow"
    torch.save(rows, ours)
    blocks = rows[: len(rows) // args.seq_length * args.seq_length].view(-1, args.seq_length, rows.shape[1])
    features = datasets.Features({args.saelens_hook: datasets.Array2D(tuple(blocks.shape[1:]), "float32")})
    datasets.Dataset.from_generator(
        lambda: ({args.saelens_hook: block.numpy()} for block in blocks),
        features=features,
        cache_dir=str(folder / "tmp"),
    ).save_to_disk(theirs)
    return str(ours), theirs
