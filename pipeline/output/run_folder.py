"""The folder of one run, `.gptbatch/runs/RUN/`: the files that only this run writes.

    lock                names the host and process of the run; empty when it has ended
    progress.json       state and speed (progress_file.py)
    crash_journal.json  the parts in flight (crash_journal.py)
    records.jsonl       a line per part that the run has written
    *.tmp               temporary files (atomic_write.py)

Several runs may write one output, each with a shard of its parts. A run takes over the records and
the crash counts of dead runs, and deletes their folders. On a file system a run holds its lock
(local_run.py). In an object store its progress tells whether it is alive (object_run.py).
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from gptbatch.pipeline.output.crash_journal import CRASH_JOURNAL, read_crash_journal
from gptbatch.pipeline.output.json_models import (
    CrashJournalContent,
    HolderContent,
    Part,
    PartRecord,
    validated,
)
from gptbatch.pipeline.output.progress_file import MAX_SILENCE_S, PROGRESS
from gptbatch.pipeline.storage.atomic_write import Writer
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import open_whole, parse_json, read_json
from gptbatch.pipeline.system.threads import map_in_threads

RUNS = "runs"
RUN_LOCK = "lock"
RECORDS = "records.jsonl"
RUN_FILES = (RUN_LOCK, PROGRESS, CRASH_JOURNAL, RECORDS)
RUN_NAME = re.compile(r"[0-9a-f]{12}")


class OtherRun(ABC):
    """The folder of another run, live or dead.

    Attributes:
        path: The folder.
    """

    path: Location

    @abstractmethod
    def is_live(self, max_silence_s: float = MAX_SILENCE_S) -> bool:
        """Return whether the run is going on.

        Args:
            max_silence_s: Seconds without progress after which a run without a lock is dead.
        """

    @abstractmethod
    def delete(self) -> None:
        """Delete the folder. Files with other names stay."""

    def config_hash(self) -> str | None:
        """Return the config hash of the run's job; None where it does not say so."""
        content = self.holder()
        return None if content is None else content.job

    def has_records(self) -> bool:
        """Return whether the run may have records."""
        return True

    def holder(self) -> HolderContent | None:
        """Return what the lock says about the process; None for a run that has ended."""
        try:
            return validated(HolderContent, read_json(self.path / RUN_LOCK))
        except (OSError, ValueError):
            return None


class RunFolder(ABC):
    """The folder of this run: a context manager that creates it.

    Attributes:
        path: The folder.
        writer: Writes files of the output.

    Raises:
        OutputCreationError: The folder cannot be created.
    """

    path: Location
    writer: Writer

    @abstractmethod
    def __enter__(self) -> RunFolder: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...

    @abstractmethod
    def record(self, part: Part, sha256: str) -> None:
        """Record a part that is written. A failure loses the record: the part itself counts."""

    @abstractmethod
    def dead_runs(self) -> AbstractContextManager[Sequence[OtherRun]]:
        """Yield the dead runs. Delete their folders after the block, unless it raises."""

    @abstractmethod
    def others(self) -> Sequence[OtherRun]:
        """Return the other runs, live and dead, oldest first."""

    def sweep(self) -> None:
        """Delete the folders of dead runs, whose records are not needed any more."""
        with self.dead_runs():
            pass

    def has_company(self, config_hash: str) -> bool:
        """Return whether another run of a job is going on."""
        return any(run.is_live() and run.config_hash() == config_hash for run in self.others())

    def others_in_flight(self, max_silence_s: float) -> set[int]:
        """Return the parts that live runs beside this one have in flight, or are about to begin."""

        def journal_of(run: OtherRun) -> CrashJournalContent | None:
            return read_crash_journal(run.path) if run.is_live(max_silence_s) else None

        journals = [found for found in map_in_threads(journal_of, self.others()) if found]
        return {
            number
            for journal in journals
            for number in (*journal.parts_in_flight, *journal.parts_reserved)
        }


def record_line(part: Part, sha256: str) -> str:
    """Return the line of records.jsonl for a part."""
    return json.dumps({**part.model_dump(), "sha256": sha256}) + "\n"


def read_records(runs: Iterable[OtherRun]) -> Iterator[PartRecord]:
    """Yield the records of runs. Damaged lines are left out, such as the last one of a dead run."""
    for lines in map_in_threads(_record_lines, [run for run in runs if run.has_records()]):
        for line in lines:
            with suppress(ValueError):
                yield validated(PartRecord, parse_json(line))


def _record_lines(run: OtherRun) -> list[bytes]:
    with suppress(OSError), open_whole(run.path / RECORDS) as file:
        return file.readlines()
    return []


def holder() -> dict[str, Any]:
    """Return what the lock of this process's run says about it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_space": pid_space(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe_holder(lock: Location) -> str:
    """Return the host and process that a lock file names."""
    try:
        content = validated(HolderContent, read_json(lock))
    except (OSError, ValueError):
        return "its host and process are unknown"
    return f"process {content.pid} on host {content.host}, since {content.since}"


def pid_space() -> str:
    """Return where the numbers of processes are those seen here: since this start, in a container.

    Containers may have the host name of their machine, and numbers of their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def is_gone(content: HolderContent) -> bool:
    """Return whether a process is known to have ended: it was one of those seen here."""
    return content.pid_space == pid_space() and not _exists(content.pid)


def _exists(pid: int) -> bool:
    """Return whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
