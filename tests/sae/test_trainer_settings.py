"""Every argument of Lightning's Trainer has the meaning that Lightning documents, or is refused with a sentence."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from deeplens_lightning.activation_data import data_parallel_ranks
from deeplens_lightning.callbacks import StreamStatistics, Throughput
from deeplens_lightning.datamodule import ActivationDataModule
from deeplens_lightning.sae import SparseAutoencoder, SparseAutoencoderGrid
from deeplens_lightning.sae.training import DictionaryTraining
from deeplens_lightning.stream.placement import placement
from tests.support.training import trainer

D, BATCH, BATCHES, HELD_OUT = 8, 16, 5, 20
"""Width, rows of a batch, batches in a pass over the training rows, and held-out rows."""
BIG = 1000.0
"""A factor of the loss that makes gradients large enough to clip."""


class Watcher(L.Callback):
    """Note what a fit does: batches, learning, gradients as the optimizer saw them, and validations."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.validations: list[int] = []
        self.held_out_batches = 0
        self.sanity_batches = 0
        self.inference: list[bool] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Tensor, _: int
    ) -> None:
        self.batches.append(batch.clone())
        self.gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.sanity_batches += trainer.sanity_checking
        self.held_out_batches += not trainer.sanity_checking
        self.inference.append(torch.is_inference_mode_enabled())

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validations.append(trainer.global_step)


class Steep(SparseAutoencoder):
    """An SAE whose gradients are large."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return BIG * super().training_step(batch, batch_idx)


class SteepGrid(SparseAutoencoderGrid):
    """A grid whose gradients are large."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return BIG * super().training_step(batch, batch_idx)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fit that has ended."""

    trainer: L.Trainer
    module: DictionaryTraining
    data: ActivationDataModule
    seen: Watcher

    @property
    def steps(self) -> int:
        return self.trainer.global_step

    @property
    def metrics(self) -> dict[str, Tensor]:
        return self.trainer.callback_metrics


@dataclass(frozen=True, kw_only=True)
class Place:
    """A cache of rows, and a folder for each test."""

    cache: str
    folder: Path
    caplog: pytest.LogCaptureFixture

    def data(self) -> ActivationDataModule:
        return ActivationDataModule(shards=self.cache, batch_size=BATCH, val_fraction=0.2, val_rows=HELD_OUT)

    def sae(self, **changes: Any) -> SparseAutoencoder:
        return Steep(D, 32, k=2, **changes)

    def grid(self, **changes: Any) -> SparseAutoencoderGrid:
        return SteepGrid(D, {"architecture": ["topk", "jumprelu", "gated"]}, {"d_sae": 32, "k": 2, **changes})

    def fit(
        self, module: DictionaryTraining | None = None, callbacks: tuple[L.Callback, ...] = (), **options: Any
    ) -> Fit:
        seen, data = Watcher(), self.data()
        length = {} if "max_steps" in options else {"max_epochs": 1}
        run = trainer(self.folder, None, [seen, *callbacks], **(length | options))
        module = self.sae() if module is None else module
        run.fit(module, data)
        return Fit(trainer=run, module=module, data=data, seen=seen)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """100 rows, of which 20 are held out: 5 batches of 16 rows."""
    path = tmp_path_factory.mktemp("cache") / "layers.0.mlp_out.pt"
    torch.save(torch.randn(100, D, generator=torch.Generator().manual_seed(0)), path)
    return str(path)


@pytest.fixture
def place(cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Place]:
    flags = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    with caplog.at_level(logging.INFO):
        yield Place(cache=cache, folder=tmp_path, caplog=caplog)
    torch.backends.cudnn.benchmark = flags[0]
    torch.use_deterministic_algorithms(flags[1])


Check = Callable[[Place], None]
CHECKS: dict[str, Check] = {}


def checks(*arguments: str) -> Callable[[Check], Check]:
    """Enter a function in the table, as the check of these arguments."""

    def enter(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(arguments, check))
        return check

    return enter


# ---- where it runs


@checks("accelerator", "devices")
def one_cpu(place: Place) -> None:
    fit = place.fit(accelerator="cpu", devices=1)
    assert fit.seen.batches[0].device == fit.module.device == torch.device("cpu")


@checks("num_nodes")
def all_ranks_of_all_nodes_share_the_rows(place: Place) -> None:
    run = trainer(place.folder, strategy="ddp", devices=2, num_nodes=3)
    assert data_parallel_ranks(run) == placement(run, place.data().settings).ranks == 6


@checks("strategy")
def strategies_that_split_weights_or_clip_on_their_own_are_refused(place: Place) -> None:
    module = place.grid()
    for strategy, words in (
        (FSDPStrategy, "FSDPStrategy splits the decoder over ranks"),
        (DeepSpeedStrategy, "DeepSpeedStrategy clips the gradients of all SAEs together"),
    ):
        module.trainer = run = SimpleNamespace(strategy=strategy.__new__(strategy))
        with pytest.raises(ValueError, match=f'{words}.*give strategy="ddp"'):
            module.configure_optimizers()
    del run
    assert place.fit(strategy="auto").steps == BATCHES


@checks("precision")
def precisions(place: Place) -> None:
    dtypes = {
        "32-true": torch.float32,
        64: torch.float64,
        "bf16-mixed": torch.float32,
        "bf16-true": torch.bfloat16,
        "16-true": torch.float16,
    }
    for precision, dtype in dtypes.items():
        module = place.grid(optimization={"eps": 1e-4})
        fit = place.fit(module, precision=precision, max_steps=2)
        assert fit.module["architecture=topk"].W_enc.dtype == dtype
        assert all(p.isfinite().all() for p in module.parameters()), precision
    for module in (place.sae(), place.grid()):
        with pytest.raises(ValueError, match=r"eps=6.25e-10 is 0 in float16.*'16-mixed'"):
            place.fit(module, precision="16-true")


@checks("plugins")
def plugins(place: Place) -> None:
    class Counting(TorchCheckpointIO):
        saved = 0

        def save_checkpoint(self, *args: Any, **options: Any) -> None:
            super().save_checkpoint(*args, **options)
            self.saved += 1

    io, precision = Counting(), MixedPrecision("bf16-mixed", "cpu")
    fit = place.fit(callbacks=(ModelCheckpoint(place.folder),), plugins=[io, precision])
    assert fit.trainer.precision == "bf16-mixed"
    assert io.saved == len(list(place.folder.glob("*.ckpt"))) == 1


@checks("sync_batchnorm")
def there_is_no_batch_norm_to_synchronise(place: Place) -> None:
    fit = place.fit(place.grid(), sync_batchnorm=True)
    assert not any(isinstance(module, _BatchNorm) for module in fit.module.modules())
    assert all(torch.equal(a, b) for a, b in zip(fit.seen.batches, place.fit().seen.batches, strict=True))


@checks("benchmark")
def benchmark(place: Place) -> None:
    place.fit(benchmark=True)
    assert torch.backends.cudnn.benchmark


@checks("deterministic")
def deterministic(place: Place) -> None:
    plain, warned, strict = (
        place.fit(place.grid(), deterministic=value, max_steps=2).module.state_dict()
        for value in (None, "warn", True)
    )
    assert torch.are_deterministic_algorithms_enabled()
    for other in (warned, strict):
        assert all(torch.equal(value, other[name]) for name, value in plain.items())


# ---- how long it runs


@checks("max_epochs", "max_steps")
def limits(place: Place) -> None:
    assert place.fit(max_epochs=2).steps == 2 * BATCHES
    assert place.fit(max_steps=7).steps == 7
    assert place.fit(max_steps=7, max_epochs=1).steps == BATCHES


@checks("min_epochs", "min_steps")
def a_stop_waits_for_the_smallest_length(place: Place) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    assert place.fit(callbacks=(Stop(),)).steps == 1
    assert place.fit(callbacks=(Stop(),), min_steps=3, min_epochs=0).steps == 3
    assert place.fit(callbacks=(Stop(),), min_epochs=2, max_epochs=3).steps == 2 * BATCHES


@checks("max_time")
def time_ends_a_fit(place: Place) -> None:
    assert place.fit(max_time=timedelta(0)).steps == 0
    assert place.fit(max_time=timedelta(days=1)).steps == BATCHES
    assert "max_time may end training earlier" in place.caplog.text


@checks("fast_dev_run")
def a_trial_writes_nothing(place: Place) -> None:
    for value, batches in ((True, 1), (3, 3)):
        fit = place.fit(fast_dev_run=value, enable_checkpointing=True, logger=True)
        assert (fit.steps, fit.seen.held_out_batches) == (batches, min(batches, 2))
        assert not list(place.folder.iterdir())


@checks("limit_train_batches")
def limit_train_batches(place: Place) -> None:
    for limit, batches in ((0, 0), (2, 2), (0.5, 2), (1.0, BATCHES), (99, BATCHES)):
        assert len(place.fit(limit_train_batches=limit).seen.batches) == batches


@checks("limit_val_batches")
def limit_val_batches(place: Place) -> None:
    for limit, rows in ((1, BATCH), (0.5, BATCH), (1.0, HELD_OUT)):
        assert place.fit(limit_val_batches=limit).metrics["val/rows"] == rows
    assert "val/rows" not in place.fit(limit_val_batches=0).metrics


@checks("limit_test_batches")
def limit_test_batches(place: Place) -> None:
    for limit, rows in ((1, BATCH), (0.5, BATCH), (1.0, HELD_OUT)):
        (figures,) = trainer(place.folder, limit_test_batches=limit).test(
            place.sae(), place.data(), verbose=False
        )
        assert figures["test/rows"] == rows


@checks("limit_predict_batches")
def limit_predict_batches(place: Place) -> None:
    for limit, batches in ((1, 1), (0.5, 1), (1.0, 2)):
        run = trainer(place.folder, limit_predict_batches=limit)
        assert len(run.predict(place.sae(), place.data()) or []) == batches


@checks("overfit_batches")
def overfit_batches(place: Place) -> None:
    for limit in (2, 0.5):
        fit = place.fit(overfit_batches=limit, max_epochs=2)
        first, second = fit.seen.batches[:2], fit.seen.batches[2:]
        assert len(first) == 2
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert fit.metrics["val/rows"] == (HELD_OUT if limit == 2 else BATCH)


# ---- validation


@checks("val_check_interval")
def val_check_interval(place: Place) -> None:
    for interval, steps in ((2, [2, 4]), (0.5, [2, 4]), (1.0, [5]), ("01:00:00:00", [])):
        assert place.fit(val_check_interval=interval).seen.validations == steps


@checks("check_val_every_n_epoch")
def check_val_every_n_epoch(place: Place) -> None:
    assert place.fit(check_val_every_n_epoch=2, max_epochs=3).seen.validations == [10]
    every = {"check_val_every_n_epoch": None, "val_check_interval": 4}
    assert place.fit(**every, max_epochs=2).seen.validations == [4, 8]


@checks("num_sanity_val_steps")
def num_sanity_val_steps(place: Place) -> None:
    expected = place.fit().metrics["val/fvu"]
    for steps, batches in ((0, 0), (1, 1), (-1, 2)):
        fit = place.fit(num_sanity_val_steps=steps)
        assert fit.seen.sanity_batches == batches
        assert fit.metrics["val/fvu"] == expected


@checks("inference_mode")
def inference_mode(place: Place) -> None:
    for value in (True, False):
        seen = Watcher()
        trainer(place.folder, None, [seen], inference_mode=value).validate(
            place.sae(), place.data(), verbose=False
        )
        assert set(seen.inference) == {value}


# ---- steps


@checks("accumulate_grad_batches")
def accumulate_grad_batches(place: Place) -> None:
    fit = place.fit(accumulate_grad_batches=2)
    assert fit.steps == math.ceil(BATCHES / 2)
    assert fit.module.activity.tokens_seen == sum(map(len, fit.seen.batches))


def norms(gradients: dict[str, Tensor], prefix: str = "") -> float:
    return float(torch.cat([g.flatten() for n, g in gradients.items() if n.startswith(prefix)]).norm())


def largest(gradients: dict[str, Tensor], prefix: str = "") -> float:
    return max(float(g.abs().max()) for n, g in gradients.items() if n.startswith(prefix))


@checks("gradient_clip_val", "gradient_clip_algorithm")
def gradients_are_clipped_for_each_sae_alone(place: Place) -> None:
    """By norm or by value as the Trainer says, by a norm of 1 if it says nothing, and not at all with 0."""
    limits = {
        "norm": ({"gradient_clip_val": 0.5}, norms, 0.5),
        "named": ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"}, norms, 0.5),
        "value": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, largest, 0.01),
        "default": ({}, norms, 1.0),
    }
    for options, size, limit in limits.values():
        for gradients in place.fit(**options, max_steps=2).seen.gradients:
            assert size(gradients) == pytest.approx(limit, rel=1e-4)
        for gradients in place.fit(place.grid(), **options, max_steps=2).seen.gradients:
            for number in range(3):
                assert size(gradients, f"saes.{number}.") == pytest.approx(limit, rel=1e-4)
    free = place.fit(place.sae(optimization={"clip_norm": None}), max_steps=2).seen.gradients
    off = place.fit(gradient_clip_val=0, max_steps=2).seen.gradients
    for a, b in zip(free, off, strict=True):
        assert norms(a) > 1
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    with pytest.raises(ValueError, match="gradient_clip_algorithm='value' needs gradient_clip_val"):
        place.fit(gradient_clip_algorithm="value")


@checks("detect_anomaly")
def detect_anomaly(place: Place) -> None:
    class Broken(SparseAutoencoder):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + (0 * self.b_dec.sum()).sqrt()

    with pytest.raises(RuntimeError, match="returned nan values"):
        place.fit(Broken(D, 32, k=2), detect_anomaly=True)
    assert place.fit(place.grid(), detect_anomaly=True, max_steps=1).steps == 1


# ---- data


@checks("use_distributed_sampler")
def the_data_module_deals_rows_itself(place: Place) -> None:
    """There is no sampler to replace: every rank gets its own rows with either value."""
    with_sampler, without = (place.fit(use_distributed_sampler=value).seen.batches for value in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_sampler, without, strict=True))


@checks("reload_dataloaders_every_n_epochs")
def reloading_repeats_and_loses_no_row(place: Place) -> None:
    batches = place.fit(reload_dataloaders_every_n_epochs=1, max_epochs=2).seen.batches
    for epoch in (batches[:BATCHES], batches[BATCHES:]):
        assert len(torch.cat(epoch).unique(dim=0)) == 100 - HELD_OUT


# ---- output


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


@checks("logger")
def loggers(place: Place) -> None:
    pair = [CSVLogger(place.folder, "a"), CSVLogger(place.folder, "b")]
    place.fit(logger=pair, log_every_n_steps=2)
    for logger in pair:
        lines = (Path(logger.log_dir) / "metrics.csv").read_text()
        assert "train/fvu" in lines
        assert "val/fvu" in lines
    assert not place.fit(logger=False).trainer.loggers


@checks("log_every_n_steps")
def log_every_n_steps(place: Place) -> None:
    for every, names in ((0, set()), (2, {"train/fvu", "tokens_per_second", "stream/rows"})):
        fit = place.fit(callbacks=(StreamStatistics(), Throughput()), log_every_n_steps=every)
        logged = {"train/fvu", "tokens_per_second", "stream/rows"} & fit.metrics.keys()
        assert logged == names
        assert "val/fvu" in fit.metrics


@checks("enable_autolog_hparams")
def enable_autolog_hparams(place: Place) -> None:
    for value in (True, False):
        logger = CSVLogger(place.folder, str(value))
        place.fit(logger=logger, log_every_n_steps=5, enable_autolog_hparams=value)
        assert ("hparams.yaml" in files(Path(logger.log_dir))) == value


@checks("callbacks")
def callbacks(place: Place) -> None:
    seen = Watcher()
    fit = place.fit(callbacks=(seen,))
    assert len(seen.batches) == len(fit.seen.batches) == BATCHES


@checks("enable_checkpointing", "default_root_dir")
def checkpoints_lie_in_the_root_folder(place: Place) -> None:
    place.fit(enable_checkpointing=False)
    assert files(place.folder) == []
    place.fit(enable_checkpointing=True)
    assert files(place.folder) == ["epoch=0-step=5.ckpt"]


@checks("enable_progress_bar")
def progress_bars(place: Place) -> None:
    for value in (True, False):
        run = trainer(place.folder, enable_progress_bar=value)
        assert placement(run, place.data().settings).progress == value
    assert place.fit(enable_progress_bar=True).steps == BATCHES


@checks("enable_model_summary")
def model_summary(place: Place) -> None:
    for module in (place.sae(), place.grid()):
        for value in (True, False):
            run = place.fit(module, enable_model_summary=value, max_steps=1).trainer
            assert any(isinstance(each, ModelSummary) for each in run.callbacks) == value


@checks("profiler")
def profiler(place: Place) -> None:
    found = SimpleProfiler()
    place.fit(profiler=found)
    assert len(found.recorded_durations["run_training_batch"]) == BATCHES
    assert place.fit(profiler="advanced").steps == BATCHES


@checks("barebones")
def a_bare_run_logs_nothing_and_is_not_told_so_for_each_metric(place: Place) -> None:
    unset = (
        "enable_checkpointing",
        "logger",
        "enable_progress_bar",
        "enable_model_summary",
        "num_sanity_val_steps",
    )
    for module in (place.sae(), place.grid()):
        fit = place.fit(module, (StreamStatistics(), Throughput()), barebones=True, **dict.fromkeys(unset))
        assert fit.steps == BATCHES
        assert not fit.metrics


@checks("model_registry")
def a_registry_is_for_paths_of_checkpoints_alone(place: Place) -> None:
    assert place.fit(model_registry="somewhere").steps == BATCHES


# ---- the table


def test_the_table_has_every_argument_of_the_trainer() -> None:
    arguments = inspect.signature(L.Trainer.__init__).parameters.keys() - {"self"}
    assert arguments == CHECKS.keys()


@pytest.mark.parametrize("check", dict.fromkeys(CHECKS.values()))
def test_every_argument_is_honoured_or_refused(check: Check, place: Place) -> None:
    check(place)
