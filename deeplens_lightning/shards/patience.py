"""Make requests to storage that may fail or never be answered: try again, and give up in time.

The request runs in a daemon thread of its own, because not every library can interrupt one. A request that was given up
may go on there; it keeps neither the caller nor the end of the interpreter waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Event, Thread
from time import monotonic
from typing import TypeVar

from deeplens_lightning.disk.mistakes import may_pass, storage_errors

T = TypeVar("T")

WAITS = (1.0, 4.0)
"""Seconds before the second and the third try of a failed request; then its error is raised."""


class SilentError(TimeoutError):
    """A request was given up because nothing had happened for some time."""


def patiently(request: Callable[[], T], seconds: float, progress: Callable[[], object] = lambda: None) -> T:
    """Make a request, up to three times if it fails with an error that may pass.

    Args:
        request: the request; it must be repeatable.
        seconds: give up after this time without progress, all tries together.
        progress: returns something else than before whenever the request has progressed.

    Raises:
        SilentError: there was no progress for `seconds`.
        Exception: the request's own error, at the third try.
    """
    outcome: Future[T] = Future()
    given_up = Event()

    def run() -> None:
        for pause in (*WAITS, None):
            try:
                outcome.set_result(request())
            except Exception as error:  # noqa: BLE001  raised again for the caller
                if pause is None or not (isinstance(error, storage_errors()) and may_pass(error)):
                    outcome.set_exception(error)
                elif not given_up.wait(pause):
                    continue
            return

    Thread(target=run, name="storage-request", daemon=True).start()
    seen, since = progress(), monotonic()
    try:
        while not wait([outcome], timeout=min(1.0, seconds / 4)).done:
            if (now := progress()) != seen:
                seen, since = now, monotonic()
            elif monotonic() - since > seconds:
                raise SilentError
        return outcome.result()
    finally:
        given_up.set()
