"""SingleFile: a file that a command writes as a whole, or not at all.

It is written in a folder beside it, `.NAME.tmp`, under a lock. A killed command leaves that folder
to the next one.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptbatch.pipeline.errors import (
    ConfigError,
    OutputBusyError,
    OutputConflictError,
    OutputCreationError,
)
from gptbatch.pipeline.output.folder import WORK
from gptbatch.pipeline.output.manifest import MANIFEST
from gptbatch.pipeline.storage.atomic_write import FileWriter
from gptbatch.pipeline.storage.location import location_of
from gptbatch.pipeline.system.file_lock import FileLock

logger = logging.getLogger("gptbatch")


class SingleFile:
    """The file that a command writes.

    Args:
        name: The path.
        command: The command, for messages.

    Attributes:
        path: The path.

    Raises:
        ConfigError: The path is in an object store.
        OutputConflictError: The path is a folder, or in the output of a run.
    """

    def __init__(self, name: str, *, command: str) -> None:
        location = location_of(name)
        if not isinstance(location, Path):
            raise ConfigError(
                f"{name}: {command} writes to a file system; copy the file to the object store "
                "afterwards",
                keys=("output",),
            )
        self.path = location
        path = self.path.absolute()
        for folder in (path, *path.parents):
            if (folder / MANIFEST).exists() or (folder / WORK).exists():
                problem = (
                    "is the output of a run"
                    if folder == path
                    else f"lies in {folder}, the output of a run, whose readers would take it for "
                    "a part"
                )
                raise OutputConflictError(f"{name}: {problem}; name a file outside of it")
        if path.is_dir():
            raise OutputConflictError(f"{name}: is a folder; name a file in it")

    def exists(self) -> bool:
        """Return whether there is a file of this name, or a link."""
        return os.path.lexists(self.path)

    def conflict(self, problem: str) -> OutputConflictError:
        """Return the error for a file that must not be replaced."""
        return OutputConflictError(
            f"{self.path}: {problem}; name another file, or replace it with --overwrite"
        )

    @contextmanager
    def writer(self) -> Iterator[FileWriter]:
        """Yield a writer of this file, under a lock.

        Raises:
            OutputBusyError: Another process writes it.
            OutputCreationError: Its folder cannot be created.
        """
        work = self.path.parent / f".{self.path.name}.tmp"
        lock = FileLock(work / "lock")
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputCreationError(
                f"{self.path}: its folder cannot be created ({error.strerror or error})"
            ) from error
        try:
            is_free = lock.acquire()
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): start no other run with this output", work, error
            )
            is_free = True
        if not is_free:
            raise OutputBusyError(f"{self.path}: another process writes it")
        try:
            for left_over in work.glob("*.tmp"):
                left_over.unlink()
            yield FileWriter(work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            lock.release()
