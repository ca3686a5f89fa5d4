"""Finds prompts whose id another row has. The first pass keeps at most 8 bytes per row.

An id of decimal digits is mapped to 64 bits one to one, any other id by BLAKE2b. A row whose id is
its position, as one without an own id, is not kept: only the ranges of such positions are.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator, Set
from typing import IO, TYPE_CHECKING

from gptbatch.pipeline.errors import StorageError
from gptbatch.pipeline.input.rows import BadRow, id_of_label
from gptbatch.pipeline.input.source import RawRow
from gptbatch.pipeline.types import Prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Hashes = NDArray[np.uint64]

# Takes hashes, and returns at least the rows whose id has one of them.
ReadRows = Callable[[Set[int]], Iterator[tuple[RawRow, Prompt | BadRow]]]

# 1 GiB of hashes
MAX_HASHES_IN_MEMORY = 1 << 27
_BUCKETS = 256
_BLOCK = 1 << 20
# Odd, so that the product modulo 2**64 is one to one. 2**64 divided by the golden ratio: the first
# byte of the products of consecutive numbers is evenly distributed.
_FACTOR = 0x9E37_79B9_7F4A_7C15
_INVERSE = pow(_FACTOR, -1, 1 << 64)
_MASK = (1 << 64) - 1
_MAX_DIGITS = 18


class IdHashes:
    """64-bit hashes of the ids of an input.

    Above `max_in_memory`, hashes lie in a temporary file. They are sorted before they are written,
    so that those with the same first byte, a bucket, are read back together.

    Args:
        max_in_memory: Hashes that are held in memory.
    """

    def __init__(self, max_in_memory: int = MAX_HASHES_IN_MEMORY) -> None:
        self._max = max_in_memory
        self._hashes = array("Q")
        # start and end of each range of positions that are the ids of their rows
        self._default_ids = array("Q")
        self._file: IO[bytes] | None = None
        # first hash of each bucket in each sorted run of the file, and the end of the run
        self._runs: list[list[int]] = []

    def add(self, prompt_id: str, position: int) -> None:
        """Add the id of one row, and its position in the input."""
        ranges = self._default_ids
        if prompt_id == str(position) and (not ranges or position >= ranges[-1]):
            if ranges and position == ranges[-1]:
                ranges[-1] += 1
            else:
                ranges.extend((position, position + 1))
            return
        self._hashes.append(id_hash(prompt_id))
        if len(self._hashes) >= self._max:
            self._spill()

    def merge(self, hashes: bytes, default_ids: bytes) -> None:
        """Add the ids of later rows, as `take` has returned them."""
        self._hashes.frombytes(hashes)
        ranges = array("Q", default_ids)
        if ranges and self._default_ids and ranges[0] == self._default_ids[-1]:
            self._default_ids[-1] = ranges[1]
            del ranges[:2]
        self._default_ids += ranges
        if len(self._hashes) >= self._max:
            self._spill()

    def take(self) -> tuple[bytes, bytes]:
        """Return the hashes and the ranges of default ids in memory, and forget them."""
        taken = self._hashes.tobytes(), self._default_ids.tobytes()
        self._hashes, self._default_ids = array("Q"), array("Q")
        return taken

    def repeated(self) -> set[int]:
        """Return the hashes of more than one row: repeated ids, and rarely equal hashes."""
        found: set[int] = set()
        for hashes in self._buckets():
            # in place: a sorted copy would take as much memory again
            hashes.sort()
            found.update(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
            if self._default_ids:
                for first in range(0, len(hashes), _BLOCK):
                    found.update(self._default_among(hashes[first : first + _BLOCK]))
        return found

    def _buckets(self) -> Iterator[Hashes]:
        """Yield all hashes, those that are equal together."""
        import numpy as np

        if self._file is None:
            if self._hashes:
                yield np.frombuffer(self._hashes, dtype=np.uint64)
            return
        self._spill()
        for bucket in range(_BUCKETS):
            joined = bytearray()
            for bounds in self._runs:
                self._file.seek(8 * bounds[bucket])
                joined += self._file.read(8 * (bounds[bucket + 1] - bounds[bucket]))
            if joined:
                yield np.frombuffer(joined, dtype=np.uint64)

    def _default_among(self, hashes: Hashes) -> list[int]:
        """Return the hashes that are those of default ids."""
        import numpy as np

        numbers = hashes * np.uint64(_INVERSE)
        ranges = np.frombuffer(self._default_ids, dtype=np.uint64)
        # An odd count of bounds up to a number: it lies inside a range.
        inside = np.searchsorted(ranges, numbers, side="right") % 2 == 1
        found: list[int] = hashes[inside].tolist()
        return found

    def _spill(self) -> None:
        """Write the hashes in memory to the temporary file, sorted."""
        import numpy as np

        if not self._hashes:
            return
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        hashes.sort()
        starts = np.arange(_BUCKETS, dtype=np.uint64) << np.uint64(56)
        begin = self._runs[-1][-1] if self._runs else 0
        bounds = [begin + int(index) for index in np.searchsorted(hashes, starts)]
        try:
            if self._file is None:
                # it stays open as long as this object
                self._file = tempfile.TemporaryFile(prefix="gptbatch-ids-")  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(8 * begin)
            self._file.write(hashes.data)
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{tempfile.gettempdir()}: the ids of the input cannot be written to a temporary "
                f"file ({error.strerror or error}); set TMPDIR to another folder, or use "
                "--ids trusted if no id occurs twice"
            ) from error
        self._runs.append([*bounds, begin + len(hashes)])
        self._hashes = array("Q")


def find_duplicates(
    read_rows: ReadRows, repeated_hashes: set[int], *, record_bad: bool
) -> tuple[dict[int, str], int]:
    """Return the index of each row whose id is taken -> the row that has it, as `line 3`.

    The first prompt with an id has it, else the first bad row. Each other row with this id is an
    error row, and its new id is made of its number: `line:3`. That may be the id of another row,
    which is a duplicate then. So the rows are read again until there are no new duplicates.

    Args:
        read_rows: Reads rows of the input again, in order.
        repeated_hashes: Hashes of ids that more than one row has.
        record_bad: Whether bad rows become error rows. Otherwise only prompts have ids.

    Returns:
        The duplicates, and the number of prompts among them.
    """
    if not repeated_hashes:
        return {}, 0
    duplicates: dict[int, str] = {}
    # index and label of all rows with an id of their own, prompts before bad rows
    owners: dict[str, list[tuple[bool, int, str]]] = {}
    # ids made of the number of a row -> its label
    numbered: dict[str, str] = {}
    for raw, row in read_rows(repeated_hashes):
        if id_hash(row.prompt_id) not in repeated_hashes:
            continue
        is_bad = isinstance(row, BadRow)
        if isinstance(row, BadRow) and row.own_id is None:
            numbered[row.prompt_id] = row.label
        elif record_bad or not is_bad:
            owners.setdefault(row.prompt_id, []).append((is_bad, row.index, raw.label))
    if not record_bad:
        numbered = {}
    new: list[str] = []
    n_prompts = 0
    for prompt_id, rows in owners.items():
        rows.sort()
        taken_by = numbered.get(prompt_id)
        for is_bad, index, label in rows if taken_by else rows[1:]:
            duplicates[index] = taken_by or rows[0][2]
            n_prompts += not is_bad
            new.append(label)
    while new and record_bad:
        numbered, new = {id_of_label(label): label for label in new}, []
        for raw, row in read_rows({id_hash(prompt_id) for prompt_id in numbered}):
            is_numbered = isinstance(row, BadRow) and row.own_id is None
            if row.prompt_id in numbered and row.index not in duplicates and not is_numbered:
                duplicates[row.index] = numbered[row.prompt_id]
                n_prompts += isinstance(row, Prompt)
                new.append(raw.label)
    return duplicates, n_prompts


def id_hash(prompt_id: str) -> int:
    """Return the hash of an id, from 0 to 2**64 - 1."""
    if (number := _number(prompt_id)) is not None:
        return number * _FACTOR & _MASK
    digest = hashlib.blake2b(prompt_id.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def position_of_hash(value: int) -> int:
    """Return the position whose decimal digits have a hash."""
    return value * _INVERSE & _MASK


def _number(text: str) -> int | None:
    """Return the number whose decimal digits are a text; None for other texts, such as "007"."""
    if len(text) > _MAX_DIGITS or not (text.isascii() and text.isdecimal()):
        return None
    return None if text[0] == "0" and len(text) > 1 else int(text)
