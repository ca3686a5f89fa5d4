"""Surroundings that libraries meet badly: no current folder, no standard output, too little memory, too few threads.

Checked before anything heavy is imported.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from contextlib import suppress

from gptbatch.pipeline.errors import ConfigError, InputNotFoundError, OutOfMemoryError, StorageError
from gptbatch.pipeline.system.machine import cgroup_folders, cores

GIB = 2**30
READING_GIB = 0.75  # address space of a command that reads Parquet, on two CPUs
COMPUTING_GIB = 1.5  # and of one that imports torch
GIB_PER_CPU = 0.04  # stacks and buffers of threads, which the libraries start for each CPU
THREADS_PER_CPU, MORE_THREADS, MAX_THREADS = (
    2,
    6,
    48,
)  # that the libraries start, and that are tried


def check_limits(*, computes: bool) -> None:
    """Check where the process runs, before it does anything.

    Raises:
        InputNotFoundError: The current folder has been deleted.
        StorageError: Standard output is closed, so that the result would be lost.
        ConfigError: The address space is too small.
        OutOfMemoryError: There are too few threads.
    """
    try:
        os.getcwd()
    except OSError as error:
        reason = (
            "no longer exists"
            if isinstance(error, FileNotFoundError)
            else f"cannot be used ({error.strerror})"
        )
        raise InputNotFoundError(f"the current folder {reason}; cd elsewhere") from None
    if sys.stdout is None:
        raise StorageError(
            "standard output is closed, and the result goes there; redirect it, to /dev/null at least"
        )
    cpus = cores().cpus
    check_address_space(
        (COMPUTING_GIB if computes else READING_GIB) + GIB_PER_CPU * max(0, cpus - 2)
    )
    check_threads(min(THREADS_PER_CPU * cpus + MORE_THREADS, MAX_THREADS))


def check_address_space(needed_gib: float) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < needed_gib * GIB:
        raise ConfigError(
            f"the address space is limited to {limit / GIB:.2f} GiB (ulimit -v), and the libraries alone map {needed_gib:.2f} GiB; "
            "lift the limit, and limit memory by a control group"
        )


def check_threads(needed: int) -> None:
    """Starts them, for a moment. Not where the address space is limited: malloc keeps some of it for each."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    done = threading.Event()
    started = []
    try:
        for _ in range(needed):
            thread = threading.Thread(target=done.wait, daemon=True)
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):
        raise OutOfMemoryError(out_of_threads()) from None
    finally:
        done.set()
        for thread in started:
            thread.join()


def out_of_memory() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"out of memory: the address space is limited to {limit / GIB:.2f} GiB (ulimit -v); lift the limit"
    return "out of memory: run it again where more is free, or with a smaller --batch-size or --memory-gib"


def out_of_threads() -> str:
    limits = []
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if processes != resource.RLIM_INFINITY:
        limits.append(f"{processes} processes and threads of this user (ulimit -u)")
    limits += [f"{most} in its control group (pids.max)" for most in _pids_limits()]
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        limits.append(f"{space / GIB:.2f} GiB of address space (ulimit -v)")
    which = f"; limits: {', '.join(limits)}" if limits else ""
    return f"no more threads or processes can be started{which}; raise the limit, or end other processes"


def _pids_limits() -> list[int]:
    found = []
    for folder in cgroup_folders("pids"):
        with suppress(OSError, ValueError):  # "max", or no such file
            found.append(int((folder / "pids.max").read_text(encoding="ascii")))
    return found
