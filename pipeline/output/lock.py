"""The lock of an output folder: one run for the whole job, or several runs with a shard each.

The operating system holds the lock, so that it ends with the process. Correctness does not depend
on it: where a file system has no locks, runs continue with a warning. Part names are still taken
once, and by one job (part_writer.py).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import TracebackType

from gptbatch.pipeline.errors import OutputBusyError
from gptbatch.pipeline.output.run_folder import describe_holder, holder, live_runs
from gptbatch.pipeline.system.file_lock import FileLock

logger = logging.getLogger("gptbatch")

LOCK = "lock"
# `gptbatch status` holds the lock for a moment.
LOCK_TIMEOUT_S = 0.5


class OutputLock:
    """A context manager that holds the lock of an output folder.

    Args:
        work: The folder `.gptbatch` of the output.
        shared: Whether other runs may hold the lock, too: those of other shards.

    Attributes:
        works: Whether the lock is held. It is not where the file system has no locks.

    Raises:
        OutputBusyError: Another run holds the lock. The message names its host and process.
    """

    def __init__(self, work: Path, *, shared: bool = False) -> None:
        self._work, self._shared = work, shared
        self._lock = FileLock(work / LOCK)
        self.works = False

    def __enter__(self) -> OutputLock:
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.works and not self._shared:
            self._lock.write_note("")
        self._lock.release()
        self.works = False

    def _describe_holder(self) -> str:
        """Describe the holder of an exclusive lock, else a run that shares the lock."""
        live = [run.path / LOCK for run in live_runs(self._work)]
        return describe_holder(next(iter(live), self._work / LOCK))
