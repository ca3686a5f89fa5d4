"""CSV and TSV as RFC 4180 describes them, with every cell kept as the text that stands in the file.

An empty cell without quotes is null, and a quoted empty cell is the empty text. Python's csv module cannot tell the two apart, and
the readers of pyarrow and pandas infer types.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.input.lines import MAX_LINE_BYTES, LineReader
from gptbatch.pipeline.input.source import RawRow

_EXCEL_DELIMITER = re.compile(rb"sep=(.)\r?\n")  # a first line that Excel reads, and writes


class CellText(str):
    """The text of a cell. A setting may be read from it: `5`, `0.7`, or the `5.0` that pandas writes for a column with gaps."""


class CsvFile:
    """The rows of one file, a dictionary of column name -> text each.

    Args:
        path: the file, plain or compressed.
        name: the file as messages name it.
        delimiter: one character between cells.
    """

    def __init__(self, path: Path, name: str, delimiter: str) -> None:
        self.path, self.name, self.delimiter = path, name, delimiter

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows after the header.

        Raises:
            InputRowsError: there is no header, or a column has no name or the name of another.
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
            _free_name(index, columns) if index in unnamed else name
            for index, name in enumerate(columns)
        ]
        for position, (number, cells) in enumerate(records):
            yield RawRow(
                where=f"{self.name}:{number}",
                line=number,
                position=position,
                parse=partial(_fields, names, unnamed, cells),
            )

    def _columns(self, number: int, header: list[str | None] | str) -> list[str]:
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
                    f"{where}: the only column is {columns[0]!r}; is the delimiter {delimiter!r}? --csv-delimiter names it"
                )
        for index, name in enumerate(columns):
            if name and name in columns[:index]:
                raise InputRowsError(f"{where}: two columns are called {name!r}")
        return columns


def _free_name(index: int, columns: list[str]) -> str:
    name = f"column {index + 1}"
    while name in columns:
        name += "'"
    return name


def _fields(names: list[str], unnamed: set[int], cells: list[str | None] | str) -> dict[str, Any]:
    """Raises ValueError for a line that is not a row of this table. unnamed: indices of columns that are left out where they are null."""
    if isinstance(cells, str):
        _bad(cells)
    if len(cells) != len(names):
        _bad(f"{len(cells)} cells, but the header names {len(names)} columns")
    fields = {
        name: cell if cell is None else CellText(cell)
        for name, cell in zip(names, cells, strict=True)
    }
    if not any(cell is not None for cell in cells):
        _bad("all cells are empty; delete the line")
    # Excel leaves empty columns behind, and pandas writes its index without a name
    for index in unnamed:
        if cells[index] is None:
            del fields[names[index]]
    return fields


def _records(
    lines: Iterable[tuple[int, bytes | None]], delimiter: str, name: str
) -> Iterator[tuple[int, list[str | None] | str]]:
    """Yield (number of the first line, cells), or in place of the cells why there are none.

    A blank line is an error unless only blank lines follow. After a malformed line the next line starts a row.

    Raises:
        InputRowsError: a quote is opened and not closed, so that no row behind it is known.
    """
    first = blanks = size = 0
    open_cells: _Record | None = None
    line_end: bytes | None = None  # of the header
    for number, line in lines:
        if open_cells is None:
            if line is not None and not line.strip(b"\r\n"):
                blanks += 1
                continue
            yield from (
                (blank, "the line is empty; only the last lines may be")
                for blank in range(number - blanks, number)
            )
            first, blanks, size, open_cells = number, 0, 0, _Record(delimiter)
        size += MAX_LINE_BYTES + 1 if line is None else len(line)
        try:
            if size > MAX_LINE_BYTES and open_cells.is_open:
                break
            if line is None:
                _bad(f"the row is longer than {MAX_LINE_BYTES} bytes")
            if open_cells.add(_decode(line)):
                if line.endswith(b"\n") and _line_end(line) != (
                    line_end := line_end or _line_end(line)
                ):
                    _bad(
                        "the line ends in another way than the header (CRLF, LF); make all lines end alike, as dos2unix does"
                    )
                yield first, open_cells.cells
                open_cells = None
        except ValueError as error:
            yield first, str(error)
            open_cells = None
    if open_cells is not None:
        raise InputRowsError(
            f"{name}:{first}: a quoted cell is opened and not closed, so that the rows behind it cannot be told"
        )


class _Record:
    """A row under way: a quoted cell may hold line ends, so that the row takes several lines."""

    def __init__(self, delimiter: str) -> None:
        self.cells: list[str | None] = []
        self._delimiter = delimiter
        self._quoted: list[str] | None = (
            None  # pieces of a quoted cell that the last line left open
        )

    @property
    def is_open(self) -> bool:
        """Whether the lines so far end inside a quoted cell."""
        return self._quoted is not None

    def add(self, line: str) -> bool:
        """Take one line with its end; return whether the row is complete. Raises ValueError for text behind a closing quote."""
        if self._quoted is None and '"' not in line:
            self.cells += [cell or None for cell in line.rstrip("\r\n").split(self._delimiter)]
            return True
        at = 0
        while True:
            if self._quoted is None:
                if not line.startswith('"', at):
                    end = line.find(self._delimiter, at)
                    cell = line[at:] if end < 0 else line[at:end]
                    self.cells.append((cell.rstrip("\r\n") if end < 0 else cell) or None)
                    if end < 0:
                        return True
                    at = end + 1
                    continue
                self._quoted, at = [], at + 1
            close = line.find('"', at)
            if close < 0:
                self._quoted.append(line[at:])
                return False
            self._quoted.append(line[at:close])
            at = close + 1
            if line.startswith('"', at):  # a doubled quote stands for one
                self._quoted.append('"')
                at += 1
                continue
            self.cells.append("".join(self._quoted))
            self._quoted = None
            if not line[at:].rstrip("\r\n"):
                return True
            if not line.startswith(self._delimiter, at):
                _bad(f"text or a space stands behind the closing quote of cell {len(self.cells)}")
            at += 1


def _line_end(line: bytes) -> bytes:
    return b"\r\n" if line.endswith(b"\r\n") else b"\n"


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 at byte {error.start + 1} of the line; if Excel wrote it, convert it with iconv -f WINDOWS-1252 -t UTF-8"
        ) from None


def _bad(reason: str) -> NoReturn:
    raise ValueError(reason)
