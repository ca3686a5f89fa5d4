"""The folder of one run, `.gptbatch/runs/RUN/`: the files that only this run writes.

    lock                held until the run ends; names its host and process
    progress.json       state and speed (progress_file.py)
    crash_journal.json  the parts in flight (crash_journal.py)
    records.jsonl       a line per part that the run has written
    *.tmp               temporary files (atomic_write.py)

Several runs may write one output, each with a shard of its parts. A run takes over the records and
the crash counts of dead runs, and deletes their folders.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gptbatch.pipeline.errors import OutputCreationError
from gptbatch.pipeline.output.atomic_write import TEMPORARY_NAME, Writer
from gptbatch.pipeline.output.crash_journal import CRASH_JOURNAL, read_crash_journal
from gptbatch.pipeline.output.json_models import HolderContent, Part, PartRecord, validated
from gptbatch.pipeline.output.progress_file import MAX_SILENCE_S, PROGRESS, seems_running
from gptbatch.pipeline.system.file_lock import FileLock, is_locked
from gptbatch.pipeline.system.regular_file import open_regular, parse_json, read_json

logger = logging.getLogger("gptbatch")

RUNS = "runs"
RUN_LOCK = "lock"
RECORDS = "records.jsonl"
_RUN_NAME = re.compile(r"[0-9a-f]{12}")
# A folder has this name until its lock is held.
_NEW_NAME = re.compile(r"[0-9a-f]{12}\.new")
# Another process may test the lock for a moment.
LOCK_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class OtherRun:
    """The folder of another run, live or dead."""

    path: Path

    def is_live(self, max_silence_s: float = MAX_SILENCE_S) -> bool:
        """Return whether the run is going on.

        The lock tells. Where it is not held, it may be held on another host whose locks are not
        seen here, or the file system has no locks: then the age of the run's progress tells.

        Args:
            max_silence_s: Seconds without progress after which such a run is dead.
        """
        if is_locked(self.path / RUN_LOCK):
            return True
        content = self._holder()
        # A run that ends empties the file.
        if content is None:
            return False
        if content.host == socket.gethostname() and not _exists(content.pid):
            return False
        return seems_running(self.path, max_silence_s)

    def config_hash(self) -> str | None:
        """Return the config hash of the run's job; None where it does not say so."""
        content = self._holder()
        return None if content is None else content.job

    def _holder(self) -> HolderContent | None:
        try:
            return validated(HolderContent, read_json(self.path / RUN_LOCK))
        except (OSError, ValueError):
            return None


class RunFolder:
    """The folder of this run: a context manager that creates it and holds its lock.

    Args:
        work: The folder `.gptbatch` of the output.
        config_hash: Of the job; None where it is not known.
        alone: Whether no other run can be going on: the lock of the output is exclusive.

    Attributes:
        path: The folder.
        writer: Writes files of the output, with temporary files in this folder.

    Raises:
        OutputCreationError: The folder cannot be created.
    """

    def __init__(self, work: Path, config_hash: str | None = None, *, alone: bool = False) -> None:
        self._work, self._config_hash, self._alone = work, config_hash, alone
        self.path = work / RUNS / secrets.token_hex(6)
        self.writer = Writer(self.path)
        self._lock: FileLock | None = None

    def __enter__(self) -> RunFolder:
        new = self.path.with_name(f"{self.path.name}.new")
        try:
            new.mkdir(parents=True)
            note = json.dumps({**holder(), "job": self._config_hash}) + "\n"
            (new / RUN_LOCK).write_text(note)
            lock = FileLock(new / RUN_LOCK)
            # Where the file system has no locks, OutputLock has warned.
            with suppress(OSError):
                if lock.acquire(timeout_s=LOCK_TIMEOUT_S):
                    self._lock = lock
            new.rename(self.path)
        except OSError as error:
            raise OutputCreationError(
                f"{self.path}: cannot be created ({error.strerror or error})"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            (self.path / RUN_LOCK).write_text("")
        if self._lock is not None:
            self._lock.release()

    def record(self, part: Part, sha256: str) -> None:
        """Record a part that is written. A full disk loses the record: the part itself counts."""
        line = json.dumps({**part.model_dump(), "sha256": sha256}) + "\n"
        with suppress(OSError), (self.path / RECORDS).open("ab") as file:
            file.write(line.encode())

    @contextmanager
    def dead_runs(self) -> Iterator[list[OtherRun]]:
        """Yield the dead runs. Delete their folders after the block, unless it raises.

        Meanwhile no other run can take them over. Where locks do not work, no run counts as dead.
        """
        with ExitStack() as stack:
            dead = []
            for run in [] if self._lock is None else self._others():
                lock = FileLock(run.path / RUN_LOCK)
                with suppress(OSError):
                    if not run.is_live() and lock.acquire():
                        stack.callback(lock.release)
                        dead.append(run)
            yield dead
            for run in dead:
                _delete(run.path)

    def sweep(self) -> None:
        """Delete the folders of dead runs, whose records are not needed any more."""
        with self.dead_runs():
            pass

    def company(self) -> set[str | None]:
        """Return the config hashes of the jobs of other runs that are going on."""
        return {run.config_hash() for run in self._others() if run.is_live()}

    def others_in_flight(self, max_silence_s: float) -> set[int]:
        """Return the parts that live runs beside this one have in flight, or are about to begin."""
        journals = [
            read_crash_journal(run.path) for run in self._others() if run.is_live(max_silence_s)
        ]
        return {
            number
            for journal in journals
            for number in (*journal.parts_in_flight, *journal.parts_reserved)
        }

    def _others(self) -> list[OtherRun]:
        runs = list_runs(self._work, with_new=self._alone)
        return [run for run in runs if run.path != self.path]


def list_runs(work: Path, *, with_new: bool = False) -> list[OtherRun]:
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
            if not (is_new or _RUN_NAME.fullmatch(entry.name)):
                continue
            with suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    continue
                changed_s = entry.stat(follow_symlinks=False).st_mtime
                if with_new or not is_new or time.time() - changed_s > MAX_SILENCE_S:
                    runs.append((changed_s, OtherRun(Path(entry.path))))
    return [run for _, run in sorted(runs, key=lambda pair: pair[0])]


def live_runs(work: Path) -> list[OtherRun]:
    """Return the runs that are going on."""
    return [run for run in list_runs(work) if run.is_live()]


def read_records(runs: Iterable[OtherRun]) -> Iterator[PartRecord]:
    """Yield the records of runs. Damaged lines are left out, such as the last one of a dead run."""
    for run in runs:
        with suppress(OSError), open_regular(run.path / RECORDS) as file:
            for line in file:
                with suppress(ValueError):
                    yield validated(PartRecord, parse_json(line))


def holder() -> dict[str, Any]:
    """Return what the lock of this process's run says about it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_holder(lock: Path) -> str:
    """Return the host and process that a lock file names."""
    try:
        content = validated(HolderContent, read_json(lock))
    except (OSError, ValueError):
        return "its host and process are unknown"
    return f"process {content.pid} on host {content.host}, since {content.since}"


def _exists(pid: int) -> bool:
    """Return whether this machine has a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _delete(path: Path) -> None:
    """Delete the folder of a run. Files with other names stay, and the folder with them."""
    with suppress(OSError):
        for entry in path.iterdir():
            if entry.name in (
                RUN_LOCK,
                PROGRESS,
                CRASH_JOURNAL,
                RECORDS,
            ) or TEMPORARY_NAME.fullmatch(entry.name):
                entry.unlink()
        path.rmdir()
