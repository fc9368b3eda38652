"""Let a validation that a checkpoint interrupted run again as a whole."""

from __future__ import annotations

from typing import Any


def repeat_interrupted_validation(checkpoint: dict[str, Any]) -> None:
    """Change the progress in a checkpoint so that Lightning repeats the validation inside which it was saved.

    Lightning would run only the batches that were left, or none at all, but a checkpoint has no sums over the batches
    before. It recognises an unfinished validation by the totals: one more batch was started than processed.

    Args:
        checkpoint: a Trainer's checkpoint, changed in place.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    progress = loops.get("epoch_loop.val_loop.batch_progress")
    if progress is None:
        return
    current, total = progress["current"], progress["total"]
    finished = progress["is_last_batch"] and current["completed"] == current["ready"]
    interrupted = current["ready"] > 0 and not finished
    done = total["completed"]
    total.update(ready=done + interrupted, started=done + interrupted, processed=done)
    if interrupted:
        current.update(dict.fromkeys(current, 0))
        progress["is_last_batch"] = False
