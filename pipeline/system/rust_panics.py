"""Panics of Rust libraries: caught, and kept off standard error.

pyo3 raises a panic as a `PanicException`. It is a BaseException of a module that cannot be imported. Rust has written its own
message and a backtrace to file descriptor 2 by then.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_lock = threading.RLock()  # descriptor 2 is the whole process's


class PanicError(Exception):
    """A Rust library panicked; the message is the panic's."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic into a PanicError, and drop what the library wrote to file descriptor 2.

    File descriptor 2 is held back inside. Without a panic it gets everything that was written to it.
    One thread at a time is inside.
    """
    with _lock:
        yield from _hold_back()


def _hold_back() -> Iterator[None]:
    saved = held = None
    with suppress(OSError, AttributeError):  # no memfd_create, or no descriptor 2
        held = os.memfd_create("stderr")
        saved = os.dup(2)
        os.dup2(held, 2)
    panicked = False
    try:
        yield
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"
        if panicked:
            raise PanicError(str(error)) from None
        raise
    finally:
        if saved is not None:
            os.dup2(saved, 2)
            os.close(saved)
        if held is not None:
            if not panicked:
                _copy_to_stderr(held)
            os.close(held)


def _copy_to_stderr(held: int) -> None:
    os.lseek(held, 0, os.SEEK_SET)
    with suppress(OSError):
        while content := os.read(held, 65536):
            os.write(2, content)
