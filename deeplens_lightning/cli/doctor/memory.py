"""Measure the memory of a stream against the promise: its buffer once, and small change.

In: a `Subject`. Out: a `Check`. What the model and one model batch need is left out by comparing a large buffer with a
small one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import threading
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType

import torch

from deeplens_lightning.cli.doctor.subject import Found, Subject, check
from deeplens_lightning.stream.live_stream import LiveStream

LARGE, SMALL = 16, 2
"""Sizes of the two buffers in batches."""

SLOT_BYTES = 160
"""Memory of a slot of the buffer beside its row: provenance, and the maps of two windows."""

NOISE = 0.4
"""What an allocator may keep between two measurements, as a share of the buffer; a second buffer would be 1."""

RESIDENT = Path("/proc/self/statm")


@check(
    "memory",
    target="the buffer once",
    advice="more than the buffer is allocated: give a smaller buffer_size, and report the figures",
)
def memory(subject: Subject) -> Found:
    """Measure how much more memory a stream with a large buffer takes than one with a small buffer."""
    if subject.device.type == "cpu" and not RESIDENT.exists():
        return Found(
            passed=None, figure=f"this system has no {RESIDENT}, which tells the memory of a process"
        )
    _serve(subject, SMALL)  # not measured: the first run also allocates what the process keeps
    small, large = _serve(subject, SMALL), _serve(subject, LARGE)
    bought, grown = large.buffer - small.buffer, large.grown - small.grown
    limit = int(bought * (1 + NOISE)) + (large.slots - small.slots) * SLOT_BYTES
    mib = 2**20
    return Found(
        passed=grown <= limit,
        figure=f"{grown / mib:,.0f} MiB for {bought / mib:,.0f} MiB of buffer, at most {limit / mib:,.0f}",
        values={"grown": grown, "buffer": bought, "limit": limit},
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Size of a buffer in slots and bytes, and bytes by which memory grew while batches were served."""

    slots: int
    buffer: int
    grown: int


def _serve(subject: Subject, batches: int) -> _Measured:
    """Serve as many batches as the buffer holds, which fills every slot; the buffer has `batches` batches."""
    data = subject.data(torch.float32)
    width = data.d_in if isinstance(data.d_in, int) else sum(data.d_in.values())
    rows = max(64, subject.sizes.buffer_bytes // (LARGE * 4 * width))
    data = subject.data(torch.float32, batch_size=rows, buffer_size=batches * rows)
    data.setup("fit")
    _free()
    with _Peak(subject.device) as peak:
        loader = data.train_dataloader()
        for _ in islice(loader, max(batches, 2 * SMALL)):
            pass
        stream = loader.stream
        if not isinstance(stream, LiveStream):
            raise TypeError(f"a data module without a cache serves from {type(stream).__name__}")
        measured = _Measured(slots=stream.buffer_rows, buffer=stream.buffer_bytes, grown=peak.grown())
    data.teardown("fit")
    return measured


def _free() -> None:
    """Return freed memory to the system, so that a run cannot take it without growing the process."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class _Peak:
    """Measures by how many bytes the memory of a device grows: for CUDA exactly, else by sampling in a thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._highest = self._read()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory-sampler", daemon=True)

    def __enter__(self) -> _Peak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def grown(self) -> int:
        """Bytes of the highest value so far above the first one."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(self._highest, self._read()) - self._before

    def _sample(self) -> None:
        while not self._ended.wait(0.002):
            self._highest = max(self._highest, self._read())

    def _read(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        if self._device.type == "mps":
            return torch.mps.current_allocated_memory()
        return int(RESIDENT.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
