"""`FitSummary`: save the last weights of a fit, print a table of its figures, and keep the curves that a report draws."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from typing_extensions import override

from deeplens_lightning.activation_data import activation_data, callbacks_of, data_parallel_ranks
from deeplens_lightning.callbacks.final_weights import (
    KeptWeights,
    Weights,
    epoch_to_continue,
    read_checkpoint,
    saves_checkpoints,
)
from deeplens_lightning.callbacks.progress import FitProgressBar, with_own_line
from deeplens_lightning.callbacks.summary_table import BestWeights, SavedWeights, Summary, summary_table
from deeplens_lightning.callbacks.support import WritesFiles, batch_rows, from_rank_zero, log_every
from deeplens_lightning.disk.records import Count, read_record, to_plain
from deeplens_lightning.preemption import Preemption
from deeplens_lightning.reporting.metric_names import by_other_names
from deeplens_lightning.reporting.run_folder import append_jsonl, note_earlier_part, run_folder, write_json

log = logging.getLogger(__name__)
_ENTRY = "fit_summary"  # of a checkpoint


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """What a fit has counted up to a checkpoint.

    Attributes:
        tokens: rows trained on, over all ranks.
        seconds: time spent training.
        since_step: step from which they are counted.
        folder: folder of the run that saved the checkpoint.
    """

    tokens: Count
    seconds: float
    since_step: Count
    folder: str


class FitSummary(Callback):
    """Saves the last weights of a fit, prints a table of results on rank 0, and writes it as `summary.json`.

    Whatever ended the fit, the last weights are on disk before the table shows figures, and the table names the file
    that holds the weights of these figures. `final.ckpt` is written unless a checkpoint callback has saved the same
    weights; it is a full checkpoint, beside those of the first `ModelCheckpoint`. A fit that ended by itself is
    validated once more if it has trained since its last validation, or had none; one that was stopped is not, and the
    table then says which step its figures are of. Nothing is saved where the Trainer saves no checkpoints
    (`enable_checkpointing=False`, `fast_dev_run`), and the table says that the weights are not kept.
    Lightning's progress bar gets a line of its own for figures (`FitProgressBar`).

    Tokens are rows trained on, over all ranks; tokens/s leaves start and validation out. Both go on after a resume; the
    new folder of the run then names the earlier one in `resumed.json`, so that a report shows both. In a grid each SAE
    has its own row. During the fit `curves.jsonl` gets every logged scalar, with any logger and with none.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._tokens = self._since_step = 0
        self._seconds = 0.0
        self._resumed_at: float | None = None
        self._loaded: _Counted | None = None  # from the checkpoint that the fit continues from
        self._kept: KeptWeights | None = None  # None outside a fit that has begun to train
        self._first_step = self._first_batch = 0
        self._measured: Weights | None = None  # the weights of the last validation
        self._figures: dict[int, dict[str, float]] = {}  # held-out figures by step
        self._first = LambdaCallback(on_train_end=self._end)
        self._last = LambdaCallback(on_fit_end=self._finish, on_exception=self._stop)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = callbacks_of(trainer)
        if stage != "fit" or self not in callbacks:
            return
        self._folder = run_folder(trainer)
        self._tokens, self._seconds, self._resumed_at, self._loaded = 0, 0.0, None, None
        self._kept, self._measured, self._figures = None, None, {}
        # The last weights are saved, and validated, before other callbacks measure at the end or replace the weights by
        # an average. Lightning's SWA alone has no final weights before its own `on_train_end`. The table comes last.
        others = [c for c in callbacks if c not in (self._first, self._last)]
        others = [c for c in others if c is self or not isinstance(c, FitSummary)]
        others = [with_own_line(c) for c in others]
        for bar in others:
            if isinstance(bar, FitProgressBar):
                bar.setup(trainer, pl_module, stage)
        at = max([i + 1 for i, c in enumerate(others) if isinstance(c, StochasticWeightAveraging)], default=0)
        trainer.callbacks = [*others[:at], self._first, *others[at:], self._last]  # type: ignore[attr-defined]

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save what was counted. Not as `state_dict`: of that, Lightning refuses a second `FitSummary`."""
        running = 0.0 if self._resumed_at is None else time.perf_counter() - self._resumed_at
        checkpoint[_ENTRY] = to_plain(
            _Counted(
                tokens=self._tokens,
                seconds=self._seconds + running,
                since_step=self._since_step,
                folder=str(self._folder.absolute()),
            )
        )

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if _ENTRY in checkpoint:
            loaded = read_record(_Counted, checkpoint[_ENTRY], "the checkpoint's entry of FitSummary")
            self._loaded, self._tokens, self._seconds = loaded, loaded.tokens, loaded.seconds

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed_at = time.perf_counter()
        self._kept = KeptWeights(self._folder)
        self._first_step, self._first_batch = trainer.global_step, _batches(trainer)
        loaded = self._loaded
        self._since_step = trainer.global_step if loaded is None else loaded.since_step
        if trainer.is_global_zero:
            earlier = None if loaded is None else Path(loaded.folder)
            note_earlier_part(self._folder, earlier, trainer.global_step)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += batch_rows(batch) * data_parallel_ranks(
            trainer
        )  # before a checkpoint of this step is saved
        if self._kept is not None:
            self._kept.note(trainer)
        every = log_every(trainer)
        if trainer.is_global_zero and every > 0 and trainer.global_step % every == 0:
            self._append_curves(trainer, ("val/", "test/"), keep=False)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._resumed_at = time.perf_counter()
        self._measured = Weights.now(trainer)
        self._figures[trainer.global_step] = _held_out(trainer)
        if trainer.is_global_zero:
            self._append_curves(trainer, ("val/",), keep=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save the last weights, and validate them if their figures are unknown. A collective."""
        self._pause()
        assert self._kept is not None
        self._kept.save(trainer)
        if self._validates_again(trainer):
            with epoch_to_continue(trainer):  # a `ModelCheckpoint` may save
                trainer.validating = True
                trainer.fit_loop.epoch_loop.val_loop.run()
                trainer.training = True
            self._pause()

    def _validates_again(self, trainer: Trainer) -> bool:
        """Whether the last weights should be validated: not after a signal to stop. A collective."""
        assert self._kept is not None
        kept = self._kept
        known = from_rank_zero(trainer, lambda: self._measured == kept.last)
        if known or not trainer.enable_validation or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        ending = any(isinstance(c, Preemption) and c.signalled for c in trainer.checkpoint_callbacks)
        return not trainer.strategy.reduce_boolean_decision(ending or trainer.received_sigterm, all=False)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Print and write the summary, after every callback has measured and written."""
        if self._kept is not None:  # otherwise the fit was at its end already when it began
            self._show(trainer)

    def _stop(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Save the last weights, and print and write the summary; an error on the way is logged."""
        if self._kept is None or _batches(trainer) == self._first_batch:
            return
        self._pause()
        try:
            self._kept.save_alone(trainer)
        except Exception as error:  # noqa: BLE001  the error that ended the fit is raised
            _log_failure("saving the last weights", exception, error)
        try:
            self._show(trainer, f"{type(exception).__name__} {exception}".strip())
        except Exception as error:  # noqa: BLE001
            _log_failure("the summary", exception, error)

    def _show(self, trainer: Trainer, stopped: str | None = None) -> None:
        if trainer.is_global_zero:
            summary = self.summary(trainer, stopped)
            content = asdict(summary) | by_other_names(summary.metrics)
            write_json(self._folder / "summary.json", content)
            Console().print(summary_table(summary))
        self._kept = None

    def summary(self, trainer: Trainer, stopped: str | None = None) -> Summary:
        """The figures of the fit up to now, on rank 0.

        Args:
            trainer: the Trainer.
            stopped: the error or signal that ended the fit, if one did.
        """
        data = activation_data(trainer)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if stopped is not None:  # an error in a validation may leave figures of a part of it
            trained = {name: value for name, value in metrics.items() if not name.startswith("val/")}
            metrics = trained | (self._figures[self._measured.step] if self._measured is not None else {})
        last = self._saved(trainer, self._kept.last if self._kept else None)
        return Summary(
            tokens=self._tokens,
            tokens_per_second=self._tokens / self._seconds if self._seconds > 0 else None,
            seconds=self._seconds,
            steps=trainer.global_step,
            since_step=self._since_step,
            hooks=list(data.hook_names),
            metrics=metrics,
            val_rows=data.val_rows,
            stopped=stopped,
            figures=(self._saved(trainer, self._measured) if self._measured is not None else last)
            if any(name.startswith("val/") for name in metrics)
            else None,
            last=last,
            best=list(self._best(trainer)),
            written=[str(path) for path in self._written(trainer)],
        )

    def _saved(self, trainer: Trainer, weights: Weights | None) -> SavedWeights:
        """The file of weights; without weights, of those in training, which are in no file."""
        file = self._kept.file_of(weights) if self._kept is not None and weights is not None else None
        why_not = None
        if file is None:
            off = not saves_checkpoints(trainer)
            why_not = "saving is off" if off else "no checkpoint was saved at this step"
        step = trainer.global_step if weights is None else weights.step
        return SavedWeights(step=step, file=file, why_not=why_not)

    def _best(self, trainer: Trainer) -> Iterator[BestWeights]:
        """The best checkpoint of each monitored metric; "step" and "epoch" only say which one is newest."""
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.monitor in (None, "step", "epoch"):
                continue
            if callback.best_model_score is not None:
                assert callback.monitor is not None
                value = float(callback.best_model_score)
                saved = read_checkpoint(callback.best_model_path)
                step = saved["global_step"] if saved is not None else None
                measured = self._figures.get(step, {}).get(callback.monitor) if step is not None else None
                yield BestWeights(
                    monitor=callback.monitor,
                    value=value,
                    step=step,
                    file=callback.best_model_path,
                    value_is_older=callback.monitor.startswith("val/")
                    and step is not None
                    and step > self._first_step
                    and (measured is None or not math.isclose(measured, value, rel_tol=1e-6)),
                )

    def _written(self, trainer: Trainer) -> Iterator[Path]:
        """The run's folder, the checkpoints that the summary names, and what callbacks list as written, each once."""
        places = [str(self._folder)]
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint):
                places += [checkpoint.best_model_path, checkpoint.last_model_path]
        if self._kept is not None and self._kept.file is not None:
            places.append(self._kept.file)
        for callback in callbacks_of(trainer):
            if isinstance(callback, WritesFiles):
                places += map(str, callback.written)
        yield from map(Path, dict.fromkeys(filter(None, places)))

    def _pause(self) -> None:
        if self._resumed_at is not None:
            self._seconds += time.perf_counter() - self._resumed_at
            self._resumed_at = None

    def _append_curves(self, trainer: Trainer, prefixes: tuple[str, ...], *, keep: bool) -> None:
        """Append the metrics whose names start with one of the prefixes (`keep`), or all others, to the curves."""
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefixes) == keep
        }
        if metrics:
            append_jsonl(self._folder / "curves.jsonl", [{"step": trainer.global_step} | metrics])


def _batches(trainer: Trainer) -> int:
    """The number of batches trained on, those before a resume included."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed)


def _held_out(trainer: Trainer) -> dict[str, float]:
    """The held-out figures of the validation that has just ended."""
    return {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}


def _log_failure(what: str, first: BaseException, error: Exception) -> None:
    """Log an error that follows the one that ended a fit; with a traceback unless the disk may be the cause."""
    log.error(
        "%s after %r failed: %r", what, first, error, exc_info=not isinstance(error, OSError | RuntimeError)
    )
