"""A clock of the stages of a run, in all of its threads."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any


class Clock:
    """Seconds in each stage, without those of inner stages.

    Args:
        now: The clock: of the wall, or `time.thread_time`.

    Attributes:
        seconds: By stage, in the main thread.
        beside: The same, in other threads.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.beside: dict[str, float] = defaultdict(float)
        self._now, self._own = now, threading.local()

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Measure a function."""
        original = getattr(owner, name)

        def timed(*arguments: Any, **settings: Any) -> Any:
            return self.time(stage, lambda: original(*arguments, **settings))

        setattr(owner, name, timed)

    def watch_steps(self, owner: Any, name: str, stage: str) -> None:
        """Measure the time inside a generator."""
        original = getattr(owner, name)

        def timed(*arguments: Any, **settings: Any) -> Iterator[Any]:
            iterator, end = original(*arguments, **settings), object()
            while (item := self.time(stage, lambda: next(iterator, end))) is not end:
                yield item

        setattr(owner, name, timed)

    def time(self, stage: str, call: Callable[[], Any]) -> Any:
        """Return what a call returns, and add its time to a stage."""
        inner: list[float] = self._own.__dict__.setdefault("inner", [])
        is_main = threading.current_thread() is threading.main_thread()
        began = self._now()
        inner.append(0.0)
        try:
            return call()
        finally:
            spent = self._now() - began
            (self.seconds if is_main else self.beside)[stage] += spent - inner.pop()
            if inner:
                inner[-1] += spent
