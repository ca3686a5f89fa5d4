"""SHA-256 digests of an input, made of digests of blocks of rows, and the places of its parts.

    block   512 rows, or fewer at the end of a part:  SHA-256 of their content
    part    SHA-256 of the digests of its blocks
    input   SHA-256 of the digests of its parts, as hexadecimal text

Parts are read and checked apart from each other, on several machines. A digest does not depend on
how rows are divided among files.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

from gptbatch.pipeline.input.source import Place, RawRow
from gptbatch.pipeline.types import DEFAULT_PART_ROWS

BLOCK_ROWS = DEFAULT_PART_ROWS
MAX_DEFAULT_PART_ROWS = 16_384
# File systems and hubs handle folders of this many files well.
MAX_DEFAULT_PARTS = 10_000


def default_part_rows(rows: int) -> int:
    """Return the rows per part for an input: a power of 2, and at most 10,000 parts if possible."""
    part_rows = DEFAULT_PART_ROWS
    while part_rows < MAX_DEFAULT_PART_ROWS and rows > MAX_DEFAULT_PARTS * part_rows:
        part_rows *= 2
    return part_rows


class InputDigests:
    """Digests and places of rows that are added in order.

    Args:
        part_rows: Rows per part. None follows `default_part_rows`.
        prefix_rows: Row counts whose prefix digest is needed. They need `part_rows`.

    Attributes:
        rows: Rows added.
        part_rows: Rows per part, known after `finish`.
        parts: Digest of each part, complete after `finish`.
        places: Place of the first row of each part, complete after `finish`.
        prefixes: Digest of the first n rows, for 0, the counts in `prefix_rows` and all rows.
    """

    def __init__(self, part_rows: int | None, prefix_rows: Iterable[int] = ()) -> None:
        self.rows = 0
        self.part_rows = part_rows or BLOCK_ROWS
        self.parts: list[str] = []
        self.places: list[Place] = []
        self._follows_rule = part_rows is None
        self._prefix_rows = frozenset(prefix_rows)
        self._block, self._blocks = hashlib.sha256(), bytearray()
        self._n_in_block = 0
        # of the first row of each block
        self._files, self._file_rows, self._offsets = array("i"), array("q"), array("q")
        self._file = self._first_of_file = self._first_position = 0
        self.prefixes = {0: input_digest([part_digest([self._block.digest()])])}

    def begin_at(self, first: Place) -> None:
        """Place the first row, which begins a part in the middle of the input."""
        self._file, self._first_of_file = first.file, -first.row
        self._first_position = first.position

    def add(self, content: bytes, raw: RawRow) -> None:
        """Add a row by the bytes that represent it."""
        if raw.file != self._file:
            self._file, self._first_of_file = raw.file, self.rows
        if self._n_in_block == 0:
            self._files.append(raw.file)
            self._file_rows.append(self.rows - self._first_of_file)
            self._offsets.append(raw.offset)
        self._block.update(content)
        self._n_in_block += 1
        self.rows += 1
        if self._n_in_block == BLOCK_ROWS or self.rows % self.part_rows == 0:
            self._blocks += self._block.digest()
            self._block, self._n_in_block = hashlib.sha256(), 0
        if self.rows in self._prefix_rows:
            self.prefixes[self.rows] = input_digest(self._part_digests())

    def finish(self) -> str:
        """Close the last part and return the digest of all rows. No rows are one empty part."""
        if self._follows_rule:
            self.part_rows = default_part_rows(self.rows)
        self.parts = self._part_digests()
        blocks = self._blocks_per_part()
        self.places = [
            Place(
                self._first_position + number * self.part_rows,
                self._files[block],
                self._file_rows[block],
                self._offsets[block],
            )
            for number, block in enumerate(range(0, len(self._files), blocks))
        ]
        digest = self.prefixes[self.rows] = input_digest(self.parts)
        return digest

    def _blocks_per_part(self) -> int:
        return -(-self.part_rows // BLOCK_ROWS)

    def _part_digests(self) -> list[str]:
        """Return the digests of the parts, the last one of which may lack rows."""
        blocks = bytes(self._blocks)
        if self._n_in_block or self.rows == 0:
            blocks += self._block.digest()
        size = 32 * self._blocks_per_part()
        return [
            hashlib.sha256(blocks[first : first + size]).hexdigest()
            for first in range(0, len(blocks), size)
        ]


class PartDigest:
    """The digest of one part, whose rows are added in order."""

    def __init__(self) -> None:
        self._block, self._rows = hashlib.sha256(), 0
        self._blocks: list[bytes] = []

    def add(self, content: bytes) -> None:
        """Add a row by the bytes that represent it."""
        self._block.update(content)
        self._rows += 1
        if self._rows % BLOCK_ROWS == 0:
            self._blocks.append(self._block.digest())
            self._block = hashlib.sha256()

    def hexdigest(self) -> str:
        """Return the digest of the rows added."""
        is_open = self._rows % BLOCK_ROWS or not self._rows
        return part_digest([*self._blocks, self._block.digest()] if is_open else self._blocks)


def part_digest(blocks: Iterable[bytes]) -> str:
    """Return the digest of a part, from the digests of its blocks in order."""
    return hashlib.sha256(b"".join(blocks)).hexdigest()


def input_digest(parts: Iterable[str]) -> str:
    """Return the digest of an input, from the digests of its parts in order."""
    return hashlib.sha256("".join(parts).encode()).hexdigest()
