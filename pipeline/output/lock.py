"""The lock of an output folder: one writer at a time.

The lock is the operating system's (flock), so that a dead process holds none. Correctness does not rest on it: where a file system
has no locks, runs go on with a warning and without sweeping: names of parts are taken once, and by one job (parts.py).
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
from gptbatch.pipeline.output.json_models import Holder, validated
from gptbatch.pipeline.system.regular_file import read_json

logger = logging.getLogger("gptbatch")

LOCK = "lock"
HOLDER = "holder.json"
LOCK_TIMEOUT_S = 0.5  # whoever asks for the status of an output holds its lock for a moment


class OutputLock:
    """A context manager. `works` inside it says whether the lock was had: without, nobody may sweep.

    Raises OutputBusyError at once, naming host and process, when another run holds it.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._lock: BaseFileLock | None = None
        self.works = False

    def __enter__(self) -> OutputLock:
        lock = FileLock(self._work / LOCK)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S, poll_interval=LOCK_TIMEOUT_S / 10)
            if isinstance(
                lock, _SoftFileLock
            ):  # what the library falls back to; a dead process on another host would hold it for ever
                lock.release()
                raise NotImplementedError("the file system has no locks")
        except Timeout as error:
            raise OutputBusyError(
                f"{self._work.parent}: another run is writing it ({_describe(self._work)})"
            ) from error
        except (NotImplementedError, OSError) as error:
            logger.warning(
                "%s cannot be locked (%s): see to it that no other run writes it; left-overs of dead runs are not swept",
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
        except StorageError as error:  # a full disk: the name of the holder is a courtesy
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
    """Whether a run is writing there now. Asks the lock, for a moment."""
    try:
        if not stat.S_ISREG(
            (work / LOCK).lstat().st_mode
        ):  # opening it would truncate the file that a link names
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
        holder = validated(Holder, read_json(work / HOLDER))
    except (OSError, ValueError):
        return "it has not said which"
    return f"process {holder.pid} on host {holder.host}, since {holder.since}"
