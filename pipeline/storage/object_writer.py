"""ObjectWriter: writes objects so that each appears whole, once, and as it was sent.

    content in memory -> check -> PUT, only if absent -> look, where the reply is unclear
    -> read back and compare

A reply does not tell what a store has done. A PUT whose reply is lost is repeated by the client,
and fails because the object exists: it is this writer's own. A conflict (409) is reported like an
existing object, and nothing was stored. So after each error the writer looks at the object:

    absent                  written again, after a pause
    the bytes that it sent  written
    other bytes             another writer was first

A store that ignores the condition would keep the last writer's object instead of the first one's.
The writer then looks before it writes. Two writers of one part still cannot lose or double rows,
since both have the same.
"""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Callable
from typing import BinaryIO

from gptbatch.pipeline.errors import StorageError
from gptbatch.pipeline.storage.atomic_write import Writer, storage_errors
from gptbatch.pipeline.storage.object_path import ObjectPath

logger = logging.getLogger("gptbatch")

MAX_TRIES = 8
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 15.0


class ObjectWriter(Writer):
    """Writes the objects of one run.

    Args:
        obeys_conditions: Whether the store refuses to write an object that exists, when it is told
            to. `obeys_conditions` finds out.
    """

    def __init__(self, *, obeys_conditions: bool = True) -> None:
        self._obeys_conditions = obeys_conditions
        # of the objects that it has written durably
        self._versions: dict[str, str] = {}

    def wrote(self, target: ObjectPath) -> bool:
        """Return whether an object has the version that this writer has read back."""
        version = self._versions.get(str(target))
        return bool(version) and version == target.info().version

    def write(
        self,
        target: ObjectPath,
        content: Callable[[BinaryIO], None],
        *,
        check: Callable[[BinaryIO], None] | None = None,
        durable: bool = True,
        only_if_absent: bool = False,
    ) -> bool:
        """Write an object. See Writer."""
        with storage_errors(target, "written"):
            file = io.BytesIO()
            content(file)
            if check is not None:
                file.seek(0)
                check(file)
            data = file.getvalue()
            if only_if_absent:
                return self._create(target, data)
            if durable:
                self._replace(target, data)
            else:
                target.bucket.put(target.key, data)
        return True

    def remove(self, target: ObjectPath) -> None:
        """Delete an object. See Writer."""
        with storage_errors(target, "removed"):
            target.unlink()

    def _create(self, target: ObjectPath, data: bytes) -> bool:
        """Write an object that is absent, and return whether it is this one."""
        flawed: str | None = None
        for count in range(MAX_TRIES):
            problem: OSError | None = None
            version = ""
            if not self._obeys_conditions and (found := _read(target)) is not None and not flawed:
                return found[0] == data
            try:
                version = target.bucket.put(
                    target.key,
                    data,
                    only_if_absent=self._obeys_conditions and not flawed,
                    replaces=flawed if self._obeys_conditions else None,
                )
            except PermissionError:
                raise
            except OSError as error:
                problem = error
            found = _read(target)
            if found is None:
                flawed = None
                _pause(count)
                continue
            if found[0] == data:
                self._versions[str(target)] = found[1]
                return True
            if problem is not None or found[1] != version:
                return False
            logger.warning("%s: reads back differently from what was sent; sent again", target)
            flawed = version
        raise problem or _not_kept(target)

    def _replace(self, target: ObjectPath, data: bytes) -> None:
        """Write an object, whether it exists or not, until it reads back as it was sent."""
        for count in range(MAX_TRIES):
            problem: OSError | None = None
            try:
                version = target.bucket.put(target.key, data)
            except PermissionError:
                raise
            except OSError as error:
                problem, version = error, ""
            found = _read(target)
            # Another version is that of a later writer.
            if found is not None and (found[0] == data or (version and found[1] != version)):
                return
            _pause(count)
        raise problem or _not_kept(target)


def obeys_conditions(target: ObjectPath, data: bytes) -> bool:
    """Write an object of this run alone, and return whether the store refuses a second one.

    Raises:
        OSError: It cannot be written.
    """
    target.bucket.put(target.key, data)
    return target.bucket.refuses_existing(target.key, data)


def _read(target: ObjectPath) -> tuple[bytes, str] | None:
    """Return an object and its version; None where there is none."""
    try:
        return target.bucket.get_version(target.key)
    except FileNotFoundError:
        return None


def _pause(count: int) -> None:
    time.sleep(min(MAX_PAUSE_S, FIRST_PAUSE_S * 2**count) * random.uniform(0.5, 1.0))


def _not_kept(target: ObjectPath) -> StorageError:
    return StorageError(
        f"{target}: reads back differently from what was sent, {MAX_TRIES} times; is the store, or "
        "the memory of this machine, failing?"
    )
