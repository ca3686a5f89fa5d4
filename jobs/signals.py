"""Stops a command on SIGTERM, SIGINT, SIGHUP, SIGXCPU, SIGUSR1 and SIGUSR2.

The first signal stops the command with exit code 75: while rows are generated, after the current
step; while it imports, loads or builds, at once. A second signal ends the process with 128 + n.
A thread watches for both, and ends the process if a library blocks the main thread. No finished
part is lost, since parts are written atomically.

Imports no heavy library, since the console script imports this module first.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# StoppedError.exit_code of pipeline/errors.py, without importing it
EXIT_STOPPED = 75
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
# the watcher ends the process this long after the first signal; a run stops within 10 s
LOADING_TIMEOUT_S = 2.0
RUNNING_TIMEOUT_S = 9.0
# timeout(1) signals the process and its group; two equal signals within this time count as one
ONE_SIGNAL_S = 0.2
_END = b"\0"

# what signal.signal takes and returns
_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupted(KeyboardInterrupt):
    """A signal outside `deferred`. Libraries handle it like Ctrl-C."""


class Signals:
    """Records the first signal, as a Stop of pipeline/output/part_runner.py.

    Handlers are installed in the main thread only. SIGHUP stays ignored under nohup. As a context
    manager it restores the earlier handlers at the end.
    """

    def __init__(self) -> None:
        self._requested: str | None = None
        self._deferred = False
        self._finished = False
        self._before: dict[signal.Signals, _Handler] = {}
        self._watcher: threading.Thread | None = None

    def requested(self) -> str | None:
        """Return the name of the signal that was received; None for no signal."""
        return self._requested

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Record a signal without raising Interrupted, while rows are generated."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._before = {
            number: signal.signal(number, self._note)
            for number in STOP_SIGNALS
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
        }
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        # without a thread, signals still arrive between two instructions of the main thread
        with suppress(RuntimeError):
            watcher.start()
            self._watcher = watcher

    def finish(self) -> None:
        """Ignore all further signals: the exit code is decided."""
        self._finished = True
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> Signals:
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before:
            self._finished = True
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._before_fd)
            if self._watcher is not None:
                os.write(self._write, _END)
                self._watcher.join()
            os.close(self._read)
            os.close(self._write)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread, between two of its instructions."""
        if self._finished or self._requested is not None:
            return
        self._requested = signal.Signals(number).name
        if not self._deferred:
            raise Interrupted(self._requested)

    def _watch(self) -> None:
        """Read signal numbers from the wake-up pipe in a thread, without the main thread."""
        first: tuple[int, float] | None = None
        while True:
            timeout = (
                None
                if first is None
                else RUNNING_TIMEOUT_S
                if self._deferred
                else LOADING_TIMEOUT_S
            )
            ready, _, _ = select.select([self._read], [], [], timeout)
            if not ready:
                if self._finished:
                    return
                # the reader of standard error may have closed it
                with suppress(OSError):
                    if sys.__stderr__ is not None:
                        os.write(
                            sys.__stderr__.fileno(),
                            b"gptbatch: stopped; run the same command again\n",
                        )
                os._exit(EXIT_STOPPED)
            for number in os.read(self._read, 64):
                if number == 0 or self._finished:
                    return
                if number not in STOP_SIGNALS:
                    continue
                now = time.monotonic()
                if first is None:
                    first = number, now
                elif number != first[0] or now - first[1] > ONE_SIGNAL_S:
                    os._exit(128 + number)
