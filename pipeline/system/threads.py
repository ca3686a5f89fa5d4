"""Threads for work that waits for a network or a disk, or that libraries do without the GIL."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 8


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results in the order of the items. Without threads to be had, it goes on alone."""
    items = list(items)
    try:
        with ThreadPoolExecutor(min(MAX_THREADS, max(1, len(items)))) as pool:
            return list(pool.map(function, items))
    except RuntimeError:
        return [function(item) for item in items]


class Worker:
    """Runs calls in a thread, one after the other. Without a thread to be had, `submit` runs them.

    Args:
        name: The name of the thread.
    """

    def __init__(self, name: str) -> None:
        pool = ThreadPoolExecutor(1, name)
        self._pool: ThreadPoolExecutor | None = pool
        try:
            # A later failure would leave a call in the queue.
            pool.submit(int).result()
        except RuntimeError:
            self._pool = None

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Run a call after all earlier ones; the future has its result, or its exception."""
        if self._pool is not None:
            return self._pool.submit(call)
        future: Future[Result] = Future()
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 - as a pool does
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Wait for all calls, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()
