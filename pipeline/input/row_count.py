"""Counts the rows of files without parsing them, and finds where a row begins.

This is about 100 times faster than reading and checking the rows. Files of lines are read in
chunks, whose line ends are counted. A Parquet file has its row count in its footer.
"""

from __future__ import annotations

import io
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

from gptbatch.pipeline.input.lines import BOM, MAX_LINE_BYTES, LineReader
from gptbatch.pipeline.input.source import Place
from gptbatch.pipeline.storage.object_path import ObjectReader

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of one file.

    Attributes:
        rows: Number of rows.
        marked_rows: Rows before each mark, ascending. A mark is the begin of a row.
        offsets: The byte of each mark. Only a plain file of lines has marks.
    """

    rows: int
    marked_rows: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))


class RowCount:
    """The rows of several files.

    Args:
        files: The rows of each file, as far as they were counted.
        limit: Number of rows to read from the front. None reads all.

    Attributes:
        rows: Number of rows.
    """

    def __init__(self, files: list[FileRows], limit: int | None = None) -> None:
        self._files = files
        # rows of the input before the end of each file
        self._ends = list(accumulate(file.rows for file in files))
        total = self._ends[-1] if files else 0
        self.rows = total if limit is None else min(total, limit)

    def place_of(self, position: int) -> Place:
        """Return the file of a row, and its number there. Its byte is not known."""
        index = bisect_right(self._ends, position)
        first = self._ends[index - 1] if index else 0
        return Place(position=position, file=index, row=position - first, offset=-1)

    def mark_before(self, position: int) -> Place:
        """Return a place to read from: that of the row, or of one before it in its file."""
        place = self.place_of(position)
        if place.file == len(self._files):
            return place
        file = self._files[place.file]
        mark = bisect_right(file.marked_rows, place.row) - 1
        if mark < 0:
            return Place(position=position - place.row, file=place.file, row=0, offset=-1)
        row = file.marked_rows[mark]
        return Place(
            position=position - place.row + row,
            file=place.file,
            row=row,
            offset=file.offsets[mark],
        )


def count_lines(reader: LineReader, blank: bytes, stop: int | None = None) -> FileRows:
    """Count the lines up to the last one that is not blank, as `lines_to_last` yields them.

    Args:
        reader: The file.
        blank: A line of these bytes only is blank.
        stop: Number of lines after which counting may end. None counts all.

    Raises:
        InputRowsError: As LineReader.lines, and so for its other errors.
    """
    marked_rows, offsets = array("q"), array("q")
    # ends: line ends so far; after_last: the byte after the last one that is not blank
    rows = ends = position = after_last = 0
    with reader.open() as file:
        is_plain = isinstance(getattr(file, "raw", None), (io.FileIO, ObjectReader))
        while chunk := file.read(CHUNK_BYTES):
            if position == 0 and chunk.startswith(BOM):
                # The bytes are counted, and a line of them alone is blank.
                chunk = blank[:1] * len(BOM) + chunk[len(BOM) :]
            if is_plain and (first := chunk.find(b"\n")) >= 0:
                marked_rows.append(ends + 1)
                offsets.append(position + first + 1)
            if size := len(chunk.rstrip(blank)):
                rows = ends + chunk.count(b"\n", 0, size) + 1
                after_last = position + size
            ends += chunk.count(b"\n")
            position += len(chunk)
            if stop is not None and rows >= stop:
                break
    if position - after_last >= MAX_LINE_BYTES - len(BOM):
        # A line that is too long is not blank, whatever it holds.
        rows = max((number for number, _, _ in reader.lines_to_last(blank)), default=0)
    return FileRows(rows, marked_rows, offsets)
