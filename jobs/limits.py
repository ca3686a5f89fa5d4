"""Checks of the process before heavy imports: current folder, standard output, memory, threads.

Without these checks, a library would abort the process or fail with a misleading message.
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
# address space on two CPUs of a command that reads Parquet, and of one that imports torch
READING_GIB = 0.75
COMPUTING_GIB = 1.5
# stacks and buffers of the threads that libraries start for each further CPU
GIB_PER_CPU = 0.04
# threads that libraries start, and the limit of the trial
THREADS_PER_CPU, FURTHER_THREADS, MAX_THREADS = 2, 6, 48


def check_limits(*, computes: bool) -> None:
    """Check the current folder, standard output, and the limits of memory and threads.

    Args:
        computes: The command imports torch, which maps more memory.

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
            "standard output is closed, but the result is written there; redirect it to a file or "
            "to /dev/null"
        )
    cpus = cores().cpus
    check_address_space(
        (COMPUTING_GIB if computes else READING_GIB) + GIB_PER_CPU * max(0, cpus - 2)
    )
    check_threads(min(THREADS_PER_CPU * cpus + FURTHER_THREADS, MAX_THREADS))


def check_address_space(needed_gib: float) -> None:
    """Raise ConfigError if `ulimit -v` allows less than this."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < needed_gib * GIB:
        raise ConfigError(
            f"the address space is limited to {limit / GIB:.2f} GiB (ulimit -v), but the libraries "
            f"alone map {needed_gib:.2f} GiB; lift the limit, and limit memory by a control group"
        )


def check_threads(needed: int) -> None:
    """Start this many threads and end them. Raise OutOfMemoryError if that fails.

    Skipped where the address space is limited, since malloc reserves a part of it per thread.
    """
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
    """Return the message for a lack of memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return (
            f"out of memory: the address space is limited to {limit / GIB:.2f} GiB (ulimit -v); "
            "lift the limit"
        )
    return (
        "out of memory: run it again where more is free, or with a smaller --batch-size or "
        "--memory-gib"
    )


def out_of_threads() -> str:
    """Return the message for a lack of threads, with the limits that apply."""
    limits = []
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if processes != resource.RLIM_INFINITY:
        limits.append(f"{processes} processes and threads of this user (ulimit -u)")
    limits += [f"{limit} in its control group (pids.max)" for limit in _pids_limits()]
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        limits.append(f"{space / GIB:.2f} GiB of address space (ulimit -v)")
    found = f"; limits: {', '.join(limits)}" if limits else ""
    return (
        f"no more threads or processes can be started{found}; "
        "raise the limit, or end other processes"
    )


def _pids_limits() -> list[int]:
    found = []
    for folder in cgroup_folders("pids"):
        # the file may hold "max", or not exist
        with suppress(OSError, ValueError):
            found.append(int((folder / "pids.max").read_text(encoding="ascii")))
    return found
