"""The folder of a run on a file system. The run holds its lock until it ends."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gptbatch.pipeline.errors import OutputCreationError
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.progress_file import MAX_SILENCE_S, seems_running
from gptbatch.pipeline.output.run_folder import (
    RECORDS,
    RUN_FILES,
    RUN_LOCK,
    RUN_NAME,
    RUNS,
    OtherRun,
    RunFolder,
    holder,
    is_gone,
    record_line,
)
from gptbatch.pipeline.storage.atomic_write import TEMPORARY_NAME, FileWriter
from gptbatch.pipeline.system.file_lock import FileLock, is_locked

# A folder has this name until its lock is held.
_NEW_NAME = re.compile(r"[0-9a-f]{12}\.new")
# Another process may test the lock for a moment.
LOCK_TIMEOUT_S = 5.0


class LocalRun(OtherRun):
    """The folder of another run on a file system.

    Args:
        path: The folder.
    """

    path: Path

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_live(self, max_silence_s: float = MAX_SILENCE_S) -> bool:
        """Return whether the run is going on.

        The lock tells. Where it is not held, it may be held on another host whose locks are not
        seen here, or the file system has no locks: then the age of the run's progress tells.
        """
        if is_locked(self.path / RUN_LOCK):
            return True
        content = self.holder()
        # A run that ends empties the file.
        if content is None or is_gone(content):
            return False
        return seems_running(self.path, max_silence_s)

    def delete(self) -> None:
        """Delete the folder. Files with other names stay, and the folder with them."""
        with suppress(OSError):
            for entry in self.path.iterdir():
                if entry.name in RUN_FILES or TEMPORARY_NAME.fullmatch(entry.name):
                    entry.unlink()
            self.path.rmdir()


class LocalRunFolder(RunFolder):
    """The folder of this run, whose lock it holds.

    Args:
        work: The folder `.gptbatch` of the output.
        config_hash: Of the job; None where it is not known.
        alone: Whether no other run can be going on: the lock of the output is exclusive.
    """

    path: Path

    def __init__(self, work: Path, config_hash: str | None = None, *, alone: bool = False) -> None:
        self._work, self._config_hash, self._alone = work, config_hash, alone
        self.path = work / RUNS / secrets.token_hex(6)
        self.writer = FileWriter(self.path)
        self._lock: FileLock | None = None

    def __enter__(self) -> LocalRunFolder:
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            new.mkdir(parents=True)
            (new / RUN_LOCK).write_text(json.dumps({**holder(), "job": self._config_hash}) + "\n")
            lock = FileLock(new / RUN_LOCK)
            # Where the file system has no locks, LocalLock has warned.
            with suppress(OSError):
                if lock.acquire(timeout_s=LOCK_TIMEOUT_S):
                    self._lock = lock
            new.rename(self.path)
        except OSError as error:
            raise OutputCreationError(
                f"{self.path}: cannot be created ({error.strerror or error})"
            ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            (self.path / RUN_LOCK).write_text("")
        if self._lock is not None:
            self._lock.release()

    def record(self, part: Part, sha256: str) -> None:
        """Append a line to the records, unless the disk is full."""
        with suppress(OSError), (self.path / RECORDS).open("ab") as file:
            file.write(record_line(part, sha256).encode())

    @contextmanager
    def dead_runs(self) -> Iterator[list[LocalRun]]:
        """Yield the dead runs, and delete their folders after the block.

        Meanwhile no other run can take them over. Where locks do not work, no run counts as dead.
        """
        with ExitStack() as stack:
            dead = []
            for run in [] if self._lock is None else self.others():
                lock = FileLock(run.path / RUN_LOCK)
                with suppress(OSError):
                    if not run.is_live() and lock.acquire():
                        stack.callback(lock.release)
                        dead.append(run)
            yield dead
            for run in dead:
                run.delete()

    def others(self) -> list[LocalRun]:
        """Return the other runs, live and dead, oldest first."""
        runs = list_local_runs(self._work, with_new=self._alone)
        return [run for run in runs if run.path != self.path]


def list_local_runs(work: Path, *, with_new: bool = False) -> list[LocalRun]:
    """Return the folders of all runs, this process's own among them, oldest first.

    Args:
        work: The folder `.gptbatch` of the output.
        with_new: Take a young folder without its final name, too. Its run may be about to acquire
            its lock.
    """
    runs = []
    with suppress(OSError):
        for entry in os.scandir(work / RUNS):
            is_new = _NEW_NAME.fullmatch(entry.name)
            if not (is_new or RUN_NAME.fullmatch(entry.name)):
                continue
            with suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    continue
                changed_s = entry.stat(follow_symlinks=False).st_mtime
                if with_new or not is_new or time.time() - changed_s > MAX_SILENCE_S:
                    runs.append((changed_s, LocalRun(Path(entry.path))))
    return [run for _, run in sorted(runs, key=lambda pair: pair[0])]
