"""Reads CSV and TSV files (RFC 4180). Every cell is the text in the file.

An empty cell without quotes is null, and a quoted empty cell is the empty string. The csv module of
Python does not distinguish them. The readers of pyarrow and pandas infer types.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.input.lines import MAX_LINE_BYTES, LineReader, decode_line
from gptbatch.pipeline.input.source import RawRow

# an optional first line that Excel reads and writes
_EXCEL_DELIMITER = re.compile(rb"sep=(.)\r?\n")

# the cells of a record, or the reason why it is malformed
Cells = list[str | None] | str


class CellText(str):
    """The text of a cell.

    A setting is parsed from it: `5`, `0.7`, or `5.0` as pandas writes integers of a column with
    empty cells.
    """


class CsvFile:
    """The rows of one file. Each is a dictionary of column name -> text.

    Args:
        path: The file, plain or compressed.
        name: The file in messages.
        delimiter: One character between cells.
    """

    def __init__(self, path: Path, name: str, delimiter: str) -> None:
        self.path, self.name, self.delimiter = path, name, delimiter

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows after the header.

        Raises:
            InputRowsError: There is no header, or column names are missing or repeated.
        """
        lines = LineReader(self.path, self.name).lines()
        first = next(lines, (1, b""))
        if (match := _EXCEL_DELIMITER.fullmatch(first[1] or b"")) is not None:
            delimiter = match[1].decode()
        else:
            delimiter, lines = self.delimiter, chain([first], lines)
        records = _records(lines, delimiter, self.name)
        number, header = next(records, (1, []))
        columns = self._columns(number, header)
        unnamed = {index for index, name in enumerate(columns) if not name}
        names = [
            _unused_name(index, columns) if index in unnamed else name
            for index, name in enumerate(columns)
        ]
        for position, (number, cells) in enumerate(records):
            yield RawRow(
                where=f"{self.name}:{number}",
                position=position,
                parse=partial(_fields, names, unnamed, cells),
            )

    def _columns(self, number: int, header: Cells) -> list[str]:
        """Return the column names, "" for a column without one."""
        where = f"{self.name}:{number}"
        if isinstance(header, str):
            raise InputRowsError(f"{where}: {header}")
        columns = [name or "" for name in header]
        if not any(columns):
            raise InputRowsError(f"{where}: there is no header; line 1 must name the columns")
        if any("\r" in name for name in columns):
            raise InputRowsError(f"{where}: lines end in CR alone; convert them to LF")
        for delimiter in (";", "\t", "|"):
            if len(columns) == 1 and delimiter in columns[0]:
                raise InputRowsError(
                    f"{where}: the only column is {columns[0]!r}; is the delimiter {delimiter!r}? "
                    "--csv-delimiter names it"
                )
        for index, name in enumerate(columns):
            if name and name in columns[:index]:
                raise InputRowsError(f"{where}: two columns are called {name!r}")
        return columns


def _unused_name(index: int, columns: list[str]) -> str:
    name = f"column {index + 1}"
    while name in columns:
        name += "'"
    return name


def _fields(names: list[str], unnamed: set[int], cells: Cells) -> dict[str, Any]:
    """Return the fields of a record. Raises ValueError where it is malformed.

    Args:
        names: Column names.
        unnamed: Indices of columns without a name in the header. They are left out where null.
        cells: The record.
    """
    if isinstance(cells, str):
        raise ValueError(cells)
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells, but the header names {len(names)} columns")
    fields = {
        name: cell if cell is None else CellText(cell)
        for name, cell in zip(names, cells, strict=True)
    }
    if not any(cell is not None for cell in cells):
        raise ValueError("all cells are empty; delete the line")
    # Excel leaves empty columns, and pandas writes its index without a name
    for index in unnamed:
        if cells[index] is None:
            del fields[names[index]]
    return fields


def _records(
    lines: Iterable[tuple[int, bytes | None]], delimiter: str, name: str
) -> Iterator[tuple[int, Cells]]:
    """Yield the number of the first line of each record, and its cells.

    A blank line is malformed unless only blank lines follow. The line after a malformed record
    begins a record.

    Raises:
        InputRowsError: A quote is opened and not closed, so that later records cannot be separated.
    """
    first = blanks = size = 0
    record: _Record | None = None
    # line end of the header
    line_end: bytes | None = None
    for number, line in lines:
        if record is None:
            if line is not None and not line.strip(b"\r\n"):
                blanks += 1
                continue
            for blank in range(number - blanks, number):
                yield blank, "the line is empty; only the last lines may be"
            first, blanks, size, record = number, 0, 0, _Record(delimiter)
        size += MAX_LINE_BYTES + 1 if line is None else len(line)
        if size > MAX_LINE_BYTES and record.is_open:
            break
        try:
            if line is None:
                raise ValueError(f"the row is longer than {MAX_LINE_BYTES} bytes")
            if record.add(decode_line(line)):
                if line.endswith(b"\n"):
                    line_end = line_end or _line_end(line)
                    _check_line_end(line, line_end)
                yield first, record.cells
                record = None
        except ValueError as error:
            yield first, str(error)
            record = None
    if record is not None:
        raise InputRowsError(
            f"{name}:{first}: a quoted cell is opened and not closed, so that the rows after it "
            "cannot be told"
        )


class _Record:
    """A record that is being read. It takes several lines if a quoted cell holds line ends."""

    def __init__(self, delimiter: str) -> None:
        self.cells: list[str | None] = []
        self._delimiter = delimiter
        # pieces of a quoted cell that the last line left open
        self._quoted: list[str] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the lines so far end inside a quoted cell."""
        return self._quoted is not None

    def add(self, line: str) -> bool:
        """Add a line with its line end and return whether the record is complete.

        Raises:
            ValueError: Text follows a closing quote.
        """
        if self._quoted is None and '"' not in line:
            self.cells += [cell or None for cell in line.rstrip("\r\n").split(self._delimiter)]
            return True
        at = 0
        while True:
            if self._quoted is None:
                if not line.startswith('"', at):
                    end = line.find(self._delimiter, at)
                    if end < 0:
                        self.cells.append(line[at:].rstrip("\r\n") or None)
                        return True
                    self.cells.append(line[at:end] or None)
                    at = end + 1
                    continue
                self._quoted, at = [], at + 1
            close = line.find('"', at)
            if close < 0:
                self._quoted.append(line[at:])
                return False
            self._quoted.append(line[at:close])
            at = close + 1
            # a doubled quote is one quote of the cell
            if line.startswith('"', at):
                self._quoted.append('"')
                at += 1
                continue
            self.cells.append("".join(self._quoted))
            self._quoted = None
            if not line[at:].rstrip("\r\n"):
                return True
            if not line.startswith(self._delimiter, at):
                raise ValueError(
                    f"text or a space follows the closing quote of cell {len(self.cells)}"
                )
            at += 1


def _line_end(line: bytes) -> bytes:
    return b"\r\n" if line.endswith(b"\r\n") else b"\n"


def _check_line_end(line: bytes, expected: bytes) -> None:
    if _line_end(line) != expected:
        raise ValueError(
            "the line ends in another way than the header (CRLF, LF); make all lines end alike, "
            "as dos2unix does"
        )
