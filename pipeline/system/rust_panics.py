"""Converts panics of Rust libraries to exceptions and removes their output.

pyo3 raises a panic as a `PanicException`, a BaseException of a module that cannot be imported.
Before that, Rust writes a message and a backtrace to file descriptor 2.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# file descriptor 2 is shared by all threads of the process
_lock = threading.RLock()


class PanicError(Exception):
    """A Rust library panicked. The message is that of the panic."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a PanicError for a panic, and discard the output of the library.

    Inside, output to file descriptor 2 is buffered. Without a panic it is written afterwards. One
    thread at a time may enter.
    """
    with _lock:
        yield from _buffer_stderr()


def _buffer_stderr() -> Iterator[None]:
    saved = held = None
    # OSError: there is no descriptor 2. AttributeError: the system has no memfd_create.
    with suppress(OSError, AttributeError):
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
