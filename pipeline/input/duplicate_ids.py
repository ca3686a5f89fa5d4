"""Finds prompts whose id another row has. The first pass keeps 8 bytes per row."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator

from gptbatch.pipeline.input.rows import BadRow
from gptbatch.pipeline.input.source import RawRow
from gptbatch.pipeline.types import Prompt

ReadRows = Callable[[], Iterator[tuple[RawRow, Prompt | BadRow]]]


class IdHashes:
    """64-bit hashes of the ids of an input."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, prompt_id: str) -> None:
        """Add the id of one row."""
        self._hashes.append(_id_hash(prompt_id))

    def repeated(self) -> set[int]:
        """Return the hashes of more than one row: repeated ids, and rarely equal hashes."""
        import numpy as np

        if not self._hashes:
            return set()
        ordered = np.sort(np.frombuffer(self._hashes, dtype=np.uint64))
        return {int(value) for value in ordered[1:][ordered[1:] == ordered[:-1]]}


def find_duplicates(
    read_rows: ReadRows, repeated_hashes: set[int], *, record_bad: bool
) -> dict[int, int]:
    """Return the index of each prompt whose id is taken -> the line of the row that has it.

    An id is taken by an earlier prompt or, with `record_bad`, by an error row. The error row of a
    bad row or of a duplicate has the id `line:N`, which may be the id of a prompt. Each such
    duplicate is a new error row, so the rows are read again until there are no new ones.

    Args:
        read_rows: Reads the input again.
        repeated_hashes: Hashes of ids that more than one row has.
        record_bad: Whether bad rows become error rows.
    """
    if not repeated_hashes:
        return {}
    duplicates: dict[int, int] = {}
    # index and line of the first prompt of each id
    first: dict[str, tuple[int, int]] = {}
    error_rows: dict[str, int] = {}
    # lines of rows that have just become error rows
    new: list[int] = []
    for raw, row in read_rows():
        if _id_hash(row.prompt_id) not in repeated_hashes:
            continue
        if isinstance(row, BadRow):
            error_rows[row.prompt_id] = row.line
        elif row.prompt_id in first:
            duplicates[row.index] = first[row.prompt_id][1]
            new.append(raw.line)
        else:
            first[row.prompt_id] = row.index, raw.line
    if not record_bad:
        return duplicates
    for prompt_id in first.keys() & error_rows.keys():
        index, line = first[prompt_id]
        duplicates[index] = error_rows[prompt_id]
        new.append(line)
    while new:
        error_rows, new = {f"line:{line}": line for line in new}, []
        for raw, row in read_rows():
            is_prompt = isinstance(row, Prompt) and row.index not in duplicates
            if is_prompt and row.prompt_id in error_rows:
                duplicates[row.index] = error_rows[row.prompt_id]
                new.append(raw.line)
    return duplicates


def _id_hash(prompt_id: str) -> int:
    digest = hashlib.blake2b(prompt_id.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
