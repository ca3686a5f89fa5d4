"""Pairs the rows of two runs by prompt_id and sample_index, and skips the pairs that are equal.

Two runs of one input have the same ids in the same places. Batches whose ids are equal are compared
as columns. All other rows are joined by their ids. Imports no torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.errors import StorageError

Row = dict[str, Any]

_KEY_COLUMNS = ("prompt_id", "sample_index")
# An id, or an id and a sample_index: most runs have one sample per row, and memory holds all keys.
_Key = str | tuple[str, int]
_DIGEST_BYTES = 16


def unequal_pairs(
    a: RunReader, b: RunReader, compared: Sequence[str], others: Sequence[str]
) -> Iterator[tuple[Row | None, Row | None]]:
    """Yield the rows of `a` that are not equal to their partners in `b`, with these.

    They come in the order of `a`. A row without a partner comes with None; those of `b` come last.

    Memory holds a batch of rows of each run, and an id and a digest per row of `b` whose batch has
    other ids than that of `a`. Such rows are read twice, and those that differ once more, or
    several times where the orders differ.

    Args:
        a: A run.
        b: Another run.
        compared: Columns that decide whether rows are equal. Texts of errors count as equal.
        others: Columns that the rows have, too.

    Raises:
        StorageError: A part cannot be read, or rows cannot be paired because a run holds an id
            twice.
    """
    names = (*_KEY_COLUMNS, *compared, *others)
    lined_up, joined = _line_up(a, b)
    partners = _Partners(b, joined, compared, others)
    alone: set[_Key] = set()
    for number, (left, right) in enumerate(zip_longest(a.batches(names), b.batches(names))):
        if number in lined_up:
            differ = _differ(left, right, compared)
            yield from zip(
                left.filter(differ).to_pylist(), right.filter(differ).to_pylist(), strict=True
            )
        elif left is not None:
            for row, partner in partners.unequal(left.to_pylist(), a):
                if partner is None:
                    if (key := _key(row)) in alone:
                        raise _duplicate_id(a, row)
                    alone.add(key)
                yield row, partner
        else:
            break
    left_over = partners.left_over()
    _require_unique(a, lined_up, {a: alone, b: set(left_over)})
    for key in left_over:
        prompt_id, sample_index = (key, 0) if isinstance(key, str) else key
        yield None, {"prompt_id": prompt_id, "sample_index": sample_index}


def _line_up(a: RunReader, b: RunReader) -> tuple[set[int], Sequence[int]]:
    """Return the numbers of batches with equal ids, and the indices of the other rows of `b`."""
    lined_up = set()
    others = array("q")
    first = 0
    for number, (left, right) in enumerate(
        zip_longest(a.batches(_KEY_COLUMNS), b.batches(_KEY_COLUMNS))
    ):
        if right is None:
            break
        if left is not None and left.equals(right):
            lined_up.add(number)
        else:
            others.extend(range(first, first + len(right)))
        first += len(right)
    return lined_up, others


class _Partners:
    """Rows of a run by their ids: their indices, and digests of the compared columns."""

    def __init__(
        self,
        run: RunReader,
        indices: Sequence[int],
        compared: Sequence[str],
        others: Sequence[str],
    ) -> None:
        """Read the rows of these indices, which increase."""
        self._indices, self._compared = indices, compared
        self._reader = run.row_reader((*_KEY_COLUMNS, *compared, *others))
        # Of each row: its place in the lists below, and in the indices.
        self._places: dict[_Key, int] = {}
        self._digests = bytearray()
        self._seen = bytearray(len(indices))
        for place, row in enumerate(run.row_reader((*_KEY_COLUMNS, *compared)).take(indices)):
            if self._places.setdefault(_key(row), place) != place:
                raise _duplicate_id(run, row)
            self._digests += self._digest(row)

    def unequal(self, rows: Sequence[Row], run: RunReader) -> Iterator[tuple[Row, Row | None]]:
        """Yield those of the rows of another run that have no partner or differ from it."""
        places: dict[_Key, int] = {}
        for row in rows:
            place = self._places.get(key := _key(row))
            if place is None:
                continue
            if self._seen[place]:
                raise _duplicate_id(run, row)
            self._seen[place] = True
            end = (place + 1) * _DIGEST_BYTES
            if self._digests[end - _DIGEST_BYTES : end] != self._digest(row):
                places[key] = place
        indices = sorted(self._indices[place] for place in places.values())
        partners = {_key(row): row for row in self._reader.take(indices)}
        for row in rows:
            if (key := _key(row)) in partners or key not in self._places:
                yield row, partners.get(key)

    def left_over(self) -> list[_Key]:
        """Return the ids of the rows that had no partner."""
        return [key for key, place in self._places.items() if not self._seen[place]]

    def _digest(self, row: Row) -> bytes:
        values = [row[name] is None if name == "error" else row[name] for name in self._compared]
        return hashlib.blake2b(repr(values).encode(), digest_size=_DIGEST_BYTES).digest()


def _require_unique(a: RunReader, lined_up: set[int], alone: Mapping[RunReader, set[_Key]]) -> None:
    """Raise StorageError if a row without a partner has the id of one whose batch lines up."""
    if not lined_up or not any(alone.values()):
        return
    for number, batch in enumerate(a.batches(_KEY_COLUMNS)):
        for row in batch.to_pylist() if number in lined_up else ():
            for run, keys in alone.items():
                if _key(row) in keys:
                    raise _duplicate_id(run, row)


def _differ(a: pa.RecordBatch, b: pa.RecordBatch, compared: Sequence[str]) -> pa.BooleanArray:
    """Return which rows of two batches of the same ids differ."""
    differ = pa.nulls(len(a), pa.bool_()).fill_null(False)
    for name in compared:
        left, right = a[name], b[name]
        if name != "error":
            if pa.types.is_list(left.type):
                left, right = _as_bytes(left), _as_bytes(right)
            # Null where one of them is null.
            differ = pc.or_(differ, pc.not_equal(left, right).fill_null(False))
        differ = pc.or_(differ, pc.xor(left.is_null(), right.is_null()))
    return differ


def _as_bytes(lists: pa.ListArray) -> pa.LargeBinaryArray:
    """Return lists of numbers as the bytes of their numbers, which compute can compare."""
    numbers = lists.values
    width = numbers.type.bit_width // 8
    ends = pc.multiply(pc.add(lists.offsets.cast(pa.int64()), numbers.offset), width)
    buffers = [lists.is_valid().buffers()[1], ends.buffers()[1], numbers.buffers()[1]]
    return pa.Array.from_buffers(pa.large_binary(), len(lists), buffers)


def _key(row: Row) -> _Key:
    """Return the id of a row, and the id and index of later samples."""
    return (row["prompt_id"], index) if (index := row["sample_index"]) else row["prompt_id"]


def _duplicate_id(run: RunReader, row: Row) -> StorageError:
    return StorageError(
        f"{run.path}: holds the id {row['prompt_id']!r} twice, so that rows cannot be paired; does "
        "it hold parts of two runs?"
    )
