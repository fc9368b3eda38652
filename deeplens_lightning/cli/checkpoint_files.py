"""Save and load checkpoints as Lightning does, with errors and messages that say what happens to which file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from deeplens_lightning.disk.mistakes import naming
from deeplens_lightning.disk.torch_files import check_checkpoint_file


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's, with the file's name in the error of a full disk, and without a warning at every resume.

    Args:
        callbacks: the checkpoint callbacks of the Trainer.
    """

    def __init__(self, callbacks: Sequence[Checkpoint]) -> None:
        self._callbacks = callbacks

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint; an error of the disk names the file."""
        with naming(path):
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, whose bytes are compared with the CRCs in it.

        A resumed run has a folder of its own. `ModelCheckpoint` then keeps the path of the best file alone, and warns of
        it as of a mistake; here its state is that already, and a ranking that begins again is said in one line.
        """
        check_checkpoint_file(path)
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        states = checkpoint.get("callbacks", {})
        for callback in self._callbacks:
            state = states.get(callback.state_key)
            if not isinstance(callback, ModelCheckpoint) or not state or state["dirpath"] == callback.dirpath:
                continue
            best = state["best_model_path"]
            states[callback.state_key] = callback.state_dict() | {"best_model_path": best}
            if callback.monitor is not None:
                rank_zero_info(
                    f"checkpoints are ranked by {callback.monitor} anew in {callback.dirpath}; the best before is {best}"
                )
        return checkpoint
