"""The lock of an output folder: one run for the whole job, or several runs with a shard each.

The operating system holds the lock, so that it ends with the process. Correctness does not depend
on it: where a file system has no locks, runs continue with a warning. Part names are still taken
once, and by one job (part_writer.py). In an object store, the progress of other runs tells.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Protocol

from gptbatch.pipeline.errors import OutputBusyError, OutputCreationError
from gptbatch.pipeline.output.local_run import list_local_runs
from gptbatch.pipeline.output.object_run import (
    MAX_SILENCE_BEFORE_START_S,
    ObjectRun,
    list_object_runs,
)
from gptbatch.pipeline.output.run_folder import describe_holder, holder
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.object_path import ObjectPath
from gptbatch.pipeline.system.file_lock import FileLock

logger = logging.getLogger("gptbatch")

LOCK = "lock"
# `gptbatch status` holds the lock for a moment.
LOCK_TIMEOUT_S = 0.5
POLL_S = 2.0
CLOCK = "clock"


class OutputLock(Protocol):
    """A context manager that holds the lock of an output folder.

    Attributes:
        works: Whether the lock is held. It is not where there are no locks.

    Raises:
        OutputBusyError: Another run holds the lock. The message names its host and process.
    """

    works: bool

    def __enter__(self) -> OutputLock: ...

    def __exit__(self, *exception: object) -> None: ...


def open_lock(work: Location, *, shared: bool = False) -> OutputLock:
    """Return the lock of an output folder.

    Args:
        work: The folder `.gptbatch` of the output.
        shared: Whether other runs may hold the lock, too: those of other shards.
    """
    return LocalLock(work, shared=shared) if isinstance(work, Path) else ObjectLock(work, shared)


class LocalLock:
    """The lock of a folder on a file system. Arguments as for `open_lock`."""

    def __init__(self, work: Path, *, shared: bool = False) -> None:
        self._work, self._shared = work, shared
        self._lock = FileLock(work / LOCK)
        self.works = False

    def __enter__(self) -> LocalLock:
        try:
            self.works = self._lock.acquire(shared=self._shared, timeout_s=LOCK_TIMEOUT_S)
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): start no other run with this output; temporary files of "
                "crashed runs are kept",
                self._work.parent,
                error,
            )
            return self
        if not self.works:
            raise OutputBusyError(
                f"{self._work.parent}: another run is writing it ({self._describe_holder()})"
            )
        if not self._shared:
            self._lock.write_note(json.dumps(holder()) + "\n")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.works and not self._shared:
            self._lock.write_note("")
        self._lock.release()
        self.works = False

    def _describe_holder(self) -> str:
        """Describe the holder of an exclusive lock, else a run that shares the lock."""
        live = [run.path / LOCK for run in list_local_runs(self._work) if run.is_live()]
        return describe_holder(next(iter(live), self._work / LOCK))


class ObjectLock:
    """Refuses to write an output in an object store while other runs show progress.

    A run that was killed a moment ago looks alive. It is waited for until it has been silent for
    MAX_SILENCE_BEFORE_START_S. Of two runs that begin at once, the younger ends (object_run.py).

    Args:
        work: The folder `.gptbatch` of the output.
        shared: Whether runs of other shards may be going on.
    """

    def __init__(self, work: ObjectPath, shared: bool) -> None:
        self._work, self._shared = work, shared
        self.works = False

    def __enter__(self) -> ObjectLock:
        if list_object_runs(self._work):
            self._read_clock()
        before = {run.path.name: _versions(run) for run in self._others()}
        if before:
            logger.warning(
                "%s: a run seems to be going on there; waiting up to a minute whether it shows "
                "progress, or was killed",
                self._work.parent,
            )
        while others := self._others():
            for run in others:
                if before.setdefault(run.path.name, _versions(run)) != _versions(run):
                    raise OutputBusyError(
                        f"{self._work.parent}: another run is writing it "
                        f"({describe_holder(run.path / LOCK)})"
                    )
            time.sleep(POLL_S)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def _read_clock(self) -> None:
        """Set the clock by which the silence of runs is measured to that of the store."""
        clock = self._work / CLOCK
        try:
            clock.bucket.put(clock.key, b"")
            clock.bucket.set_clock(clock.info().modified_s)
            clock.unlink()
        except OSError as error:
            raise OutputCreationError(
                f"{clock}: cannot be written ({error.strerror or error})"
            ) from error

    def _others(self) -> list[ObjectRun]:
        """Return the live runs beside which this one must not begin."""
        return [
            run
            for run in list_object_runs(self._work)
            if run.is_live(MAX_SILENCE_BEFORE_START_S) and not (self._shared and run.is_shared())
        ]


def _versions(run: ObjectRun) -> dict[str, str]:
    return {name: file.info().version for name, file in run.files.items()}
