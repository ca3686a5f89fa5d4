"""How an exception becomes a message on standard error and an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys

import click

from jobs.limits import out_of_memory, out_of_threads
from jobs.messages import clean, say
from pipeline.errors import GptbatchError, StoppedError, StorageError

BUG = 70
MAX_QUOTED = 200
MAX_CAUSES = 20

logger = logging.getLogger("gptbatch")

_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|cannot allocate memory|bad_alloc|out of memory|memory allocation of \d+|"
    r"failed to map segment|malloc of size|realloc of size|Unable to allocate|os error 12\b",
    re.IGNORECASE,
)
_THREADS = re.compile(
    r"can't start new thread|Resource temporarily unavailable|failed to spawn|os error 11\b|pthread_create", re.IGNORECASE
)


def report(error: BaseException, signal_name: str | None) -> int:
    """Say what happened, and return the exit code. signal_name: the signal that has arrived, if one has."""
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        say(f"stopped{f' by {signal_name}' if signal_name else ''}; run the same command again")
        return StoppedError.exit_code
    if isinstance(error, click.ClickException):
        say_usage(error)
        return error.exit_code
    if isinstance(error, SystemExit):  # how click ends when the reader of our standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at exit
        return StorageError.exit_code
    if not isinstance(error, StoppedError) and (shortage := find_shortage(error)) is not None:
        say(shortage)
        return StoppedError.exit_code
    if isinstance(error, GptbatchError):
        say(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        say(f"{error.filename or 'I/O'}: {error.strerror or error}")
        return StorageError.exit_code
    logger.error("this is a bug in gptbatch; please report it with the lines below", exc_info=error)
    return BUG


def say_usage(error: click.ClickException) -> None:
    """As click shows it: usage, hint, error; cleaned, and with long values cut."""
    shown = io.StringIO()
    error.show(file=shown)
    text = re.sub(rf"\S{{{MAX_QUOTED + 1},}}", lambda found: f"{found[0][:MAX_QUOTED]}...", shown.getvalue().rstrip("\n"))
    click.echo(clean(text, indent=""), err=True)


def find_shortage(error: BaseException) -> str | None:
    """The message where memory or threads ran out, by the error or by one that caused it; else None."""
    link: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if link is None:
            return None
        number = link.errno if isinstance(link, OSError) else None
        # torch, pyarrow and the Rust libraries (whose panics are no Exceptions) say it in words only
        in_words = isinstance(link, (RuntimeError, ImportError)) or type(link) is Exception or not isinstance(link, Exception)
        text = str(link) if in_words else ""
        if isinstance(link, MemoryError) or number == errno.ENOMEM or _MEMORY.search(text):
            return out_of_memory()
        if number == errno.EAGAIN or _THREADS.search(text):
            return out_of_threads()
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None
