"""Signals that ask a command to stop: SIGTERM, SIGINT, SIGHUP, SIGXCPU, and SIGUSR1 and SIGUSR2, which schedulers send.

The first one stops the command with 75: at the next step while rows are generated, at once while
it imports, loads or builds. A second one ends the process at once with 128 + n. A thread watches
both: where the main thread is held up inside a library, the process is ended all the same, which
costs nothing, since parts are written whole or not at all.

Imports nothing heavy: this is the first module of ours that the console script runs.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

EXIT_STOPPED = 75  # errors.StoppedError.exit_code
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGHUP,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
LOADING_PATIENCE_S = 2.0
RUNNING_PATIENCE_S = 9.0  # a run that is asked to stop ends within 10 s
ONE_SIGNAL_S = (
    0.2  # timeout(1) sends its signal to the process and to its group: within this it is one signal
)
_END = b"\0"


class Interrupted(KeyboardInterrupt):
    """A signal while nothing is at stake. Libraries treat it as they treat Ctrl-C."""


class Signals:
    """Turns signals into wishes (gptbatch.pipeline.output.part_runner.Stop).

    Only the main thread of a process has any. SIGHUP stays ignored where it is (nohup).
    As a context manager it restores the handlers at the end.
    """

    def __init__(self) -> None:
        self._requested: str | None = None
        self._deferred = False
        self._finished = False
        self._before: dict[signal.Signals, object] = {}
        self._watcher: threading.Thread | None = None

    def requested(self) -> str | None:
        return self._requested

    @contextmanager
    def deferred(self) -> Iterator[None]:
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
        with suppress(
            RuntimeError
        ):  # no threads to be had: signals arrive between two instructions only
            watcher.start()
            self._watcher = watcher

    def finish(self) -> None:
        """The exit code is decided: what arrives from now on changes nothing, to the end of the process."""
        self._finished = True
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> Signals:
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before:
            self._finished = True
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._before_fd)
            if self._watcher is not None:
                os.write(self._write, _END)
                self._watcher.join()
            os.close(self._read)
            os.close(self._write)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its instructions."""
        if self._finished or self._requested is not None:
            return
        self._requested = signal.Signals(number).name
        if not self._deferred:
            raise Interrupted(self._requested)

    def _watch(self) -> None:
        """In a thread of its own: the numbers of the signals arrive in a pipe at once, whatever the main thread is in."""
        first: tuple[int, float] | None = None
        while True:
            patience = (
                None
                if first is None
                else RUNNING_PATIENCE_S
                if self._deferred
                else LOADING_PATIENCE_S
            )
            ready, _, _ = select.select([self._read], [], [], patience)
            if not ready:
                if self._finished:
                    return
                with suppress(OSError):  # nobody may be left to read it
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
