"""Find the rank, the number of data-parallel ranks and the devices of this process.

In: the Trainer, if there is one, and the settings. Out: a `Placement`.
"""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy

from deeplens_lightning.devices import device_of
from deeplens_lightning.stream.settings import DataSettings
from deeplens_lightning.types import Placement


def placement(trainer: Trainer | None, settings: DataSettings) -> Placement:
    """The placement of this process, final in `setup`.

    Args:
        trainer: the Trainer; None without one, which is a single rank.
        settings: the settings of the data module, for the devices that they name.

    Raises:
        ValueError: the strategy forms groups of ranks in a way that is not known.
    """
    chosen = settings.buffer_options.device
    if trainer is None:
        device, rank, ranks, progress, group = device_of(settings.device), 0, 1, True, None
    else:
        strategy = trainer.strategy
        device = device_of(strategy.root_device)
        replicas = strategy.distributed_sampler_kwargs if isinstance(strategy, ParallelStrategy) else {}
        rank, ranks = replicas.get("rank", 0), replicas.get("num_replicas", 1)
        progress = rank == 0 and trainer.progress_bar_callback is not None
        group = _data_parallel_group(trainer, ranks)
    return Placement(
        rank=rank,
        ranks=ranks,
        device=device,
        batch_device=device_of(chosen) if chosen else device,
        progress=progress,
        group=group,
    )


def _data_parallel_group(trainer: Trainer, ranks: int) -> torch.distributed.ProcessGroup | None:
    """Process group of the ranks that get different rows; None if these are all processes."""
    if ranks == trainer.world_size:
        return None
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return trainer.strategy.device_mesh["data_parallel"].get_group()
    raise ValueError(
        f"{type(trainer.strategy).__name__} gives different rows to {ranks} of {trainer.world_size} processes, and how "
        "they are grouped is known for ModelParallelStrategy only: use that strategy, or DDPStrategy"
    )
