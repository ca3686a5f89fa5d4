"""Files that appear whole or not at all, and stay: how every file of an output is written.

    temporary file on the same file system -> close -> fsync -> check -> link or replace -> fsync of both folders

After a kill or a power cut at any moment the name holds the old content or the new one; the next run sweeps the temporary file.
A temporary name is `NAME.RUN.tmp`, RUN being 12 hexadecimal digits that each run draws anew.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from gptbatch.pipeline.errors import OutOfMemoryError, StorageError

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
TEMPORARY_NAME = re.compile(r".+\.[0-9a-f]{12}\.tmp")


class Writer:
    """Writes files of one run. `work` holds the temporary ones, and is on the same file system as the targets."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.run_id = secrets.token_hex(6)

    def write(
        self,
        target: Path,
        content: Callable[[BinaryIO], None],
        *,
        check: Callable[[Path], None] | None = None,
        durable: bool = True,
        only_if_absent: bool = False,
    ) -> bool:
        """Put what `content` writes under the name `target`. A symbolic link there is replaced, never followed.

        Args:
            target: The final name.
            content: Writes the content to an open file.
            check: Looks at the finished temporary file, and raises to leave the target as it was.
            durable: Wait until it would survive a power cut; without, the replacement is still atomic.
            only_if_absent: Leave what has the name, and return False. Of several writers one succeeds, by a hard link; where the
                file system has none, two that write at the same moment may both succeed, and the last one stays.

        Returns:
            Whether the target is this file now.

        Raises:
            StorageError: It cannot be written; the message names the target.
            OutOfMemoryError: There is no memory to write it.
        """
        temporary = self.work / f"{target.name}.{self.run_id}.tmp"
        try:
            with temporary.open("xb") as file:
                content(file)
            if durable:
                _fsync(temporary)
            if check is not None:
                check(temporary)
            if only_if_absent:
                if not _link(temporary, target):
                    return False
            else:
                os.replace(temporary, target)
            if durable:
                for folder in {target.parent, self.work}:
                    _fsync(folder)
        except OSError as error:
            raise StorageError(
                f"{target}: cannot be written ({error.strerror or error})"
            ) from error
        except MemoryError as error:
            raise OutOfMemoryError(
                f"{target}: cannot be written: out of memory ({error})"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return True

    def write_text(
        self, target: Path, text: str, *, durable: bool = True, only_if_absent: bool = False
    ) -> bool:
        r"""As `write`, in UTF-8. A name that is not UTF-8 becomes `\udce8`, an escape of JSON and YAML."""
        content = text.encode("utf-8", "backslashreplace")
        return self.write(
            target,
            lambda file: _write_all(file, content),
            durable=durable,
            only_if_absent=only_if_absent,
        )

    def remove(self, target: Path) -> None:
        """Remove a file for good; none there is fine. Raises StorageError."""
        try:
            with suppress(FileNotFoundError):
                target.unlink()
                _fsync(target.parent)
        except OSError as error:
            raise StorageError(
                f"{target}: cannot be removed ({error.strerror or error})"
            ) from error


def sweep(work: Path) -> None:
    """Remove the temporary files of runs that are dead. Call while holding the lock of the folder."""
    for path in work.iterdir():
        if TEMPORARY_NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def _link(temporary: Path, target: Path) -> bool:
    """Give the file a name that nothing has. False when something has it."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        try:  # NFS may lose the reply to a link that succeeded
            return os.path.samestat(target.lstat(), temporary.lstat())
        except FileNotFoundError:  # gone again
            return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(target):
            return False
        os.replace(temporary, target)
    return True


def _write_all(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def _fsync(path: Path) -> None:
    """Of a file or a folder. Some file systems have no fsync of folders, and say so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
            raise
    finally:
        os.close(descriptor)
