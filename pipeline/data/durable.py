"""Files that appear whole or not at all, and stay: how every file of an output is written.

    temporary file on the same file system -> close -> fsync -> check -> replace -> fsync of both folders

After a kill or a power cut at any moment the name holds the old content or the new one; what is left of the temporary file is
swept by the next run. A temporary name is `NAME.RUN.tmp`, RUN being 12 hexadecimal digits that each run draws anew.

Knows: files. Does not know: what is in them.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StorageError

TEMPORARY_NAME = re.compile(r".+\.[0-9a-f]{12}\.tmp")


class Writer:
    """Writes files of one run. `work` holds the temporary ones, and is on the same file system as the targets."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.run_id = secrets.token_hex(6)

    def write(
        self, target: Path, content: Callable[[BinaryIO], None], *, check: Callable[[Path], None] | None = None, durable: bool = True
    ) -> None:
        """Put what `content` writes under the name `target`.

        check: looks at the finished temporary file, and raises to leave the target as it was. durable: wait until it would survive a
        power cut; without, the replacement is still atomic. Raises StorageError that names the target.
        """
        temporary = self.work / f"{target.name}.{self.run_id}.tmp"
        try:
            with temporary.open("wb") as file:
                content(file)
            if durable:
                _fsync(temporary)
            if check is not None:
                check(temporary)
            os.replace(temporary, target)
            if durable:
                for folder in {target.parent, self.work}:
                    _fsync(folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"{target}: cannot be written ({error.strerror or error})") from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def write_text(self, target: Path, text: str, *, durable: bool = True) -> None:
        r"""As `write`, in UTF-8. A name that is not UTF-8 becomes `\udce8`, an escape of JSON and YAML."""
        self.write(target, lambda file: _write_all(file, text.encode("utf-8", "backslashreplace")), durable=durable)

    def remove(self, target: Path) -> None:
        """Remove a file for good; none there is fine. Raises StorageError."""
        try:
            if target.exists():
                target.unlink()
                _fsync(target.parent)
        except OSError as error:
            raise StorageError(f"{target}: cannot be removed ({error.strerror or error})") from error


def sweep(work: Path) -> None:
    """Remove the temporary files of runs that are dead. Call while holding the lock of the folder."""
    for path in work.iterdir():
        if TEMPORARY_NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


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
