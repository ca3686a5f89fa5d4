"""FileLock: a lock on a file, exclusive or shared, that ends with its process (flock)."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

POLL_S = 0.05


class FileLock:
    """A lock on a file. Its holder may leave a note in the file for those that are refused.

    flock works on local file systems and, by lock servers, on NFS. It never outlives its process.

    Args:
        path: The file. It is created if it does not exist, and stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, *, shared: bool = False, timeout_s: float = 0.0) -> bool:
        """Try to acquire the lock.

        Args:
            shared: Allow other shared holders. Otherwise there is no other holder.
            timeout_s: Seconds to wait for the lock; 0 tries once.

        Returns:
            Whether the lock is held now.

        Raises:
            OSError: The file cannot be opened, or its file system has no locks.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, 0o644)
        deadline = time.monotonic() + timeout_s
        try:
            while not _try_flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return False
                time.sleep(POLL_S)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def write_note(self, text: str) -> None:
        """Replace the content of the file, if the disk allows."""
        assert self._descriptor is not None
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file. Acquires the lock for a moment."""
    lock = FileLock(path)
    try:
        # Not created here, and a FIFO or device is not opened.
        if not path.is_file() or path.is_symlink():
            return False
        held = not lock.acquire()
    except OSError:
        return False
    lock.release()
    return held


def _try_flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
