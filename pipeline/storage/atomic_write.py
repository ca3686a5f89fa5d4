"""Atomic and durable writes: every file of an output appears whole, or not at all.

Objects are written by object_writer.py, and files as follows:

    temporary file on the same file system -> close -> fsync -> check -> link or replace -> fsync of
    both folders

After a kill or a power cut the name holds the old content or the new one. The temporary file,
`NAME.tmp`, lies in the folder of its run, which the next run deletes.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from gptbatch.pipeline.errors import OutOfMemoryError, StorageError
from gptbatch.pipeline.storage.location import Location

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
TEMPORARY_NAME = re.compile(r".+\.tmp")


class Writer(Protocol):
    """Writes the files of one run."""

    def write(
        self,
        target: Any,
        content: Callable[[BinaryIO], None],
        *,
        check: Callable[[BinaryIO], None] | None = None,
        durable: bool = True,
        only_if_absent: bool = False,
    ) -> bool:
        """Write a file.

        Args:
            target: The final name: a Path for files, an ObjectPath for objects.
            content: Writes the content to an open file.
            check: Inspects the finished content; raises to keep the old target.
            durable: Wait until the file survives a power cut, and compare an object with what was
                sent. The replacement is atomic in any case.
            only_if_absent: Keep an existing target, and return False.

        Returns:
            Whether the file was written.

        Raises:
            StorageError: The file cannot be written.
            OutOfMemoryError: There is not enough memory to write it.
        """

    def wrote(self, target: Any) -> bool:
        """Return whether a file is known to be as this writer has left it."""
        return False

    def remove(self, target: Any) -> None:
        """Delete a file durably; a missing file is no error.

        Raises:
            StorageError: The file cannot be deleted.
        """

    def write_text(
        self, target: Location, text: str, *, durable: bool = True, only_if_absent: bool = False
    ) -> bool:
        r"""Write a text in UTF-8, as `write` does.

        Bytes of file names that are not UTF-8 become escapes of JSON and YAML, such as `\udce8`.
        """
        content = text.encode("utf-8", "backslashreplace")
        return self.write(
            target,
            lambda file: _write_all(file, content),
            durable=durable,
            only_if_absent=only_if_absent,
        )


@contextmanager
def storage_errors(target: Location, what: str) -> Iterator[None]:
    """Turn errors of the file system and of memory into those that a Writer raises.

    Args:
        target: The file.
        what: "written" or "removed".
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"{target}: cannot be {what} ({error.strerror or error})") from error
    except MemoryError as error:
        raise OutOfMemoryError(f"{target}: cannot be {what}: out of memory ({error})") from error


class FileWriter(Writer):
    """Writes the files of one run on a file system.

    A symbolic link at a target is replaced, not followed. Of several writers of an absent file, a
    hard link makes one succeed. On a file system without hard links, two simultaneous writers may
    both succeed, and the last one wins.

    Args:
        work: The folder of the temporary files, on the file system of the targets. No other run
            writes there.
    """

    def __init__(self, work: Path) -> None:
        self.work = work

    def write(
        self,
        target: Path,
        content: Callable[[BinaryIO], None],
        *,
        check: Callable[[BinaryIO], None] | None = None,
        durable: bool = True,
        only_if_absent: bool = False,
    ) -> bool:
        """Write a file. See Writer."""
        temporary = self.work / f"{target.name}.tmp"
        with storage_errors(target, "written"):
            try:
                with temporary.open("xb") as file:
                    content(file)
                if durable:
                    _fsync(temporary)
                if check is not None:
                    with temporary.open("rb") as file:
                        check(file)
                if only_if_absent:
                    if not _link(temporary, target):
                        return False
                else:
                    os.replace(temporary, target)
                if durable:
                    for folder in {target.parent, self.work}:
                        _fsync(folder)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
        return True

    def remove(self, target: Path) -> None:
        """Delete a file durably. See Writer."""
        with storage_errors(target, "removed"), suppress(FileNotFoundError):
            target.unlink()
            _fsync(target.parent)


def _link(temporary: Path, target: Path) -> bool:
    """Give a file a free name too, by a hard link where there are any; False if it is taken.

    A file system without hard links renames the file.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        try:
            # NFS may lose the reply to a link that succeeded.
            return os.path.samestat(target.lstat(), temporary.lstat())
        except FileNotFoundError:
            # The other file is deleted again.
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
    """Flush a file or folder to the disk.

    Errors of file systems without fsync of folders are ignored.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
            raise
    finally:
        os.close(descriptor)
