"""Signals that ask a run to stop: SIGTERM, SIGINT and SIGUSR1 (which Slurm sends before the time is up).

The first one stops the run: at the next step while rows are generated, at once while it loads or builds. A second one ends the
process at once with 128 + n. A thread watches both: where the main one is held up inside a library, the process is ended all the
same, which costs nothing, since parts are written whole or not at all.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from pipeline.errors import StoppedError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOADING_PATIENCE_S = 2.0
RUNNING_PATIENCE_S = 9.0  # a run that is asked to stop ends within 10 s
_END = b"\0"


class Interrupted(KeyboardInterrupt):
    """A signal while nothing is at stake. Libraries treat it as they treat Ctrl-C."""


class Signals:
    """A context manager that turns signals into wishes (pipeline.loop.Stop); only the main thread of a process has any."""

    def __init__(self) -> None:
        self._requested: str | None = None
        self._deferred = False

    def requested(self) -> str | None:
        return self._requested

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __enter__(self) -> Signals:
        self._before: dict[signal.Signals, object] = {}
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._before_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
            self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._before_fd)
            os.write(self._write, _END)
            self._watcher.join()
            os.close(self._read)
            os.close(self._write)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its instructions."""
        self._requested = signal.Signals(number).name
        if not self._deferred:
            raise Interrupted

    def _watch(self) -> None:
        """In a thread of its own: the numbers of the signals arrive in a pipe at once, whatever the main thread is in."""
        seen = False
        while True:
            patience = (RUNNING_PATIENCE_S if self._deferred else LOADING_PATIENCE_S) if seen else None
            ready, _, _ = select.select([self._read], [], [], patience)
            if not ready:
                with suppress(OSError):  # nobody may be left to read it
                    if sys.__stderr__ is not None:
                        os.write(sys.__stderr__.fileno(), b"gptbatch: stopped; run the same command again\n")
                os._exit(StoppedError.exit_code)
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if number in STOPPING:
                    if seen:
                        os._exit(128 + number)
                    seen = True
