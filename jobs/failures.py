"""How an exception becomes a message on standard error and an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
from pathlib import Path

import click

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
            return _out_of_memory()
        if number == errno.EAGAIN or _THREADS.search(text):
            return _out_of_threads()
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def _out_of_memory() -> str:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"out of memory: the address space is limited to {limit / 2**30:.2f} GiB (ulimit -v); raise or lift the limit"
    return "out of memory: run it again where more is free, or with a smaller --batch-size or --memory-gib"


def _out_of_threads() -> str:
    import resource

    limits = []
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if processes != resource.RLIM_INFINITY:
        limits.append(f"{processes} processes and threads of this user (ulimit -u)")
    limits += [f"{most} in its control group (pids.max)" for most in _pids_limits()]
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        limits.append(f"{space / 2**30:.2f} GiB of address space (ulimit -v)")
    which = f"; limits are {', '.join(limits)}" if limits else ""
    return f"no more threads or processes can be started{which}: raise the limit, end other processes, or take fewer --threads"


def _pids_limits() -> list[int]:
    from pipeline.machine import cgroup_folders

    found = []
    for folder in cgroup_folders("pids"):
        try:
            found.append(int((Path(folder) / "pids.max").read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return found
