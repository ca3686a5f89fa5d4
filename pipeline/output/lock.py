"""The lock of an output folder: one writer at a time.

The operating system holds the lock (flock), so that it ends with the process. Correctness does not
depend on it: where a file system has no locks, runs continue with a warning, and keep temporary
files of crashed runs. Part names are still taken once, and by one job (part_writer.py).
"""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import BaseFileLock, FileLock, Timeout
from filelock import SoftFileLock as _SoftFileLock

from gptbatch.pipeline.errors import OutputBusyError, StorageError
from gptbatch.pipeline.output.atomic_write import Writer
from gptbatch.pipeline.output.json_models import HolderContent, validated
from gptbatch.pipeline.system.regular_file import read_json

logger = logging.getLogger("gptbatch")

LOCK = "lock"
HOLDER = "holder.json"
# `gptbatch status` holds the lock for a moment.
LOCK_TIMEOUT_S = 0.5


class OutputLock:
    """A context manager that holds the lock of an output folder.

    Args:
        work: The folder `.gptbatch` of the output.

    Attributes:
        works: Whether the lock is held. It is not where the file system has no locks; temporary
            files of other runs must then stay.

    Raises:
        OutputBusyError: Another run holds the lock. The message names its host and process.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._lock: BaseFileLock | None = None
        self.works = False

    def __enter__(self) -> OutputLock:
        lock = FileLock(self._work / LOCK)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S, poll_interval=LOCK_TIMEOUT_S / 10)
            # The fallback of the library. A crashed process on another host would hold it for ever.
            if isinstance(lock, _SoftFileLock):
                lock.release()
                raise NotImplementedError("the file system has no locks")
        except Timeout as error:
            raise OutputBusyError(
                f"{self._work.parent}: another run is writing it ({_describe(self._work)})"
            ) from error
        except (NotImplementedError, OSError) as error:
            logger.warning(
                "%s cannot be locked (%s): start no other run with this output; temporary files of "
                "crashed runs are kept",
                self._work.parent,
                error,
            )
            return self
        self._lock, self.works = lock, True
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        try:
            Writer(self._work).write_text(
                self._work / HOLDER, json.dumps(holder) + "\n", durable=False
            )
        except StorageError as error:
            # A full disk: the lock works without the name of its holder.
            logger.warning("%s", error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            with suppress(OSError):
                (self._work / HOLDER).unlink(missing_ok=True)
            self._lock.release()
            self._lock, self.works = None, False


def is_held(work: Path) -> bool:
    """Return whether a run holds the lock of an output. Acquires the lock for a moment."""
    try:
        # Opening a link would truncate its target.
        if not stat.S_ISREG((work / LOCK).lstat().st_mode):
            return False
    except OSError:
        return False
    lock = FileLock(work / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except (NotImplementedError, OSError):
        return False
    lock.release()
    return False


def _describe(work: Path) -> str:
    try:
        holder = validated(HolderContent, read_json(work / HOLDER))
    except (OSError, ValueError):
        return "its host and process are unknown"
    return f"process {holder.pid} on host {holder.host}, since {holder.since}"
