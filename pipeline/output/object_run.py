"""The folder of a run in an object store. Its progress tells whether the run is alive.

There are no locks, and an object cannot be extended: the records are written anew every
RECORD_INTERVAL_S. What a killed run has not recorded is found in its parts.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property

from gptbatch.pipeline.errors import OutputBusyError, OutputCreationError, StorageError
from gptbatch.pipeline.output.json_models import HolderContent, Part
from gptbatch.pipeline.output.progress_file import PROGRESS
from gptbatch.pipeline.output.run_folder import (
    RECORDS,
    RUN_FILES,
    RUN_LOCK,
    RUN_NAME,
    RUNS,
    OtherRun,
    RunFolder,
    describe_holder,
    holder,
    is_gone,
    record_line,
)
from gptbatch.pipeline.storage.object_path import ObjectPath
from gptbatch.pipeline.storage.object_writer import ObjectWriter, obeys_conditions

logger = logging.getLogger("gptbatch")

RECORD_INTERVAL_S = 30.0
# A run that shows no progress for this time has been killed. It writes its progress six times as
# often.
MAX_SILENCE_S = 120.0
# The same for a run of the whole job that is about to begin.
MAX_SILENCE_BEFORE_START_S = 60.0
# Times of objects are in whole seconds.
CLOCK_TICK_S = 1.1


class ObjectRun(OtherRun):
    """The folder of another run in an object store.

    Args:
        path: The folder.
        files: Its files by name, as they were listed.
    """

    path: ObjectPath

    def __init__(self, path: ObjectPath, files: dict[str, ObjectPath]) -> None:
        self.path, self.files = path, files

    def is_live(self, max_silence_s: float = MAX_SILENCE_S) -> bool:
        """Return whether the run shows progress, by the clock of the store."""
        # A run that ends empties the file.
        if RUN_LOCK not in self.files or self.files[RUN_LOCK].info().size == 0:
            return False
        if self.silence_s() >= max_silence_s:
            return False
        content = self.holder()
        return content is not None and not is_gone(content)

    def is_shared(self) -> bool:
        """Return whether the run may be going on beside those of other shards."""
        content = self.holder()
        return content is not None and content.shared

    def has_records(self) -> bool:
        """Return whether the listing had records: without them no request is needed."""
        return RECORDS in self.files

    def holder(self) -> HolderContent | None:
        """Return what the lock says about the process; None for a run that has ended."""
        return self._holder

    @cached_property
    def _holder(self) -> HolderContent | None:
        return super().holder()

    def silence_s(self) -> float:
        """Return the seconds since the run has shown progress."""
        written = [self.files[name].info() for name in (PROGRESS, RUN_LOCK) if name in self.files]
        last_s = max((info.modified_s for info in written), default=0.0)
        return self.path.bucket.now_s() - last_s

    def delete(self) -> None:
        """Delete the objects. Those with other names stay."""
        with suppress(OSError):
            for name, file in self.files.items():
                if name in RUN_FILES:
                    file.unlink()


class ObjectRunFolder(RunFolder):
    """The folder of this run in an object store.

    Args:
        work: The folder `.gptbatch` of the output.
        config_hash: Of the job; None where it is not known.
        shared: Whether runs of other shards may be going on.
    """

    path: ObjectPath

    def __init__(
        self, work: ObjectPath, config_hash: str | None = None, *, shared: bool = True
    ) -> None:
        self._work = work
        self._note = {"job": config_hash, "shared": shared}
        self.path = work / RUNS / secrets.token_hex(6)
        self._records: list[str] = []
        self._recorded_s = time.monotonic()

    def __enter__(self) -> ObjectRunFolder:
        lock = self.path / RUN_LOCK
        content = json.dumps({**holder(), **self._note}) + "\n"
        try:
            conditional = obeys_conditions(lock, content.encode())
            lock.bucket.set_clock(lock.info().modified_s)
        except OSError as error:
            raise OutputCreationError(
                f"{self.path}: cannot be created ({error.strerror or error})"
            ) from error
        if not conditional:
            logger.warning(
                "%s: the store replaces an object that it is told to keep: of two writers of one "
                "part the last one stays, with the same rows but for their times",
                lock.bucket.url,
            )
        self.writer = ObjectWriter(obeys_conditions=conditional)
        if not self._note["shared"]:
            self._refuse_older_runs()
        return self

    def __exit__(self, *exception: object) -> None:
        self._write_records()
        with suppress(OSError):
            lock = self.path / RUN_LOCK
            lock.bucket.put(lock.key, b"")

    def record(self, part: Part, sha256: str) -> None:
        """Record a part, at the latest with the first one after RECORD_INTERVAL_S."""
        self._records.append(record_line(part, sha256))
        if time.monotonic() - self._recorded_s >= RECORD_INTERVAL_S:
            self._write_records()

    @contextmanager
    def dead_runs(self) -> Iterator[list[ObjectRun]]:
        """Yield the dead runs, and delete their objects after the block."""
        dead = [run for run in self.others() if not run.is_live()]
        yield dead
        # Parts that this run has taken over are recorded before they are forgotten there.
        self._write_records()
        for run in dead:
            run.delete()

    def others(self) -> list[ObjectRun]:
        """Return the other runs, live and dead, oldest first."""
        return [run for run in list_object_runs(self._work) if run.path != self.path]

    def _refuse_older_runs(self) -> None:
        """End this run if another one has begun since ObjectLock looked; of two, the older goes on.

        After a tick of the clock, all runs that began in the same second are seen, by each of them.

        Raises:
            OutputBusyError: Another run is going on.
        """
        time.sleep(CLOCK_TICK_S)
        lock = self.path / RUN_LOCK
        mine = (lock.info().modified_s, self.path.name)
        for run in self.others():
            theirs = (run.files[RUN_LOCK].info().modified_s if RUN_LOCK in run.files else 0.0,)
            if run.is_live(MAX_SILENCE_BEFORE_START_S) and (*theirs, run.path.name) < mine:
                lock.bucket.put(lock.key, b"")
                raise OutputBusyError(
                    f"{self._work.parent}: another run is writing it "
                    f"({describe_holder(run.path / RUN_LOCK)})"
                )

    def _write_records(self) -> None:
        self._recorded_s = time.monotonic()
        if self._records:
            with suppress(StorageError):
                text = "".join(self._records)
                self.writer.write_text(self.path / RECORDS, text, durable=False)


def list_object_runs(work: ObjectPath) -> list[ObjectRun]:
    """Return the folders of all runs, this process's own among them, oldest first."""
    files: defaultdict[str, dict[str, ObjectPath]] = defaultdict(dict)
    with suppress(OSError):
        for file in (work / RUNS).walk_files():
            run = file.parent
            if run.parent == work / RUNS and RUN_NAME.fullmatch(run.name):
                files[run.name][file.name] = file
    runs = [ObjectRun(work / RUNS / name, found) for name, found in files.items()]
    return sorted(runs, key=lambda run: -run.silence_s())
