"""Run calls in a few daemon threads, in order; the end of the interpreter does not wait for them.

`ThreadPoolExecutor` would keep the interpreter from exiting until every file that was asked for is fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread

_Job = tuple[Callable[[], None], Future[None]]


class FetchThreads:
    """Threads that run calls in the order in which they are submitted; they start with the first call.

    Args:
        count: number of threads.
    """

    def __init__(self, count: int) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._count = count
        self._threads: list[Thread] = []

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Queue a call."""
        future: Future[None] = Future()
        self._jobs.put((work, future))
        if not self._threads:
            self._threads = [
                Thread(target=_run, args=(self._jobs,), name="shard-fetch", daemon=True)
                for _ in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
        return future

    def stop(self) -> None:
        """Drop the queued calls, and end each thread after the call that it runs."""
        try:
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job[1].cancel()
        except Empty:
            for _ in self._threads:
                self._jobs.put(None)

    def join(self) -> None:
        """Wait until all threads have ended, after `stop`."""
        for thread in self._threads:
            thread.join()


def _run(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        work, future = job
        del job
        if future.set_running_or_notify_cancel():
            try:
                work()
            except BaseException as error:  # noqa: BLE001  raised again by `Future.result`
                future.set_exception(error)
            else:
                future.set_result(None)
        del work, future
