r"""Reads JSON lines.

A line ends at \n and nowhere else, is UTF-8, and holds one strict JSON object.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError
from gptbatch.pipeline.input.file_kind import MAX_SNIFFED_LINES, describe_text
from gptbatch.pipeline.input.lines import LineReader, decode_line
from gptbatch.pipeline.input.row_count import FileRows, count_lines
from gptbatch.pipeline.input.source import START, Place, RawRow
from gptbatch.pipeline.input.strict_json import parse_object
from gptbatch.pipeline.storage.location import Location

_BLANK = b" \t\r\n"


class JsonlFile:
    """A file of JSON lines, plain or compressed.

    Standard input and pipes are copied to a temporary file, since the rows are read twice.

    Args:
        path: The file. `-` is standard input.
        name: The file in messages. None takes its path.

    Raises:
        InputNotFoundError: There is no such file.
    """

    def __init__(self, path: str | Location, name: str | None = None) -> None:
        self.path: Location = Path(path) if isinstance(path, str) else path
        self.name = name or ("<stdin>" if str(path) == "-" else str(path))
        self._spool: IO[bytes] | None = None
        if str(path) == "-":
            if sys.stdin is None:
                raise InputNotFoundError("<stdin>: is closed")
            self._copy(sys.stdin.buffer)
        elif self.path.is_file():
            return
        elif self.path.is_dir():
            raise InputNotFoundError(f"{self.name}: is a folder; name a file, or use --dataset")
        elif not self.path.exists():
            raise InputNotFoundError(f"{self.name}: no such file")
        else:
            with self.path.open("rb") as pipe:
                self._copy(pipe)

    def _copy(self, stream: BinaryIO) -> None:
        """Copy a stream to a file that exists until this object is deleted."""
        self._spool = tempfile.NamedTemporaryFile(prefix="gptbatch-input-")  # noqa: SIM115
        shutil.copyfileobj(stream, self._spool)
        self._spool.flush()
        self.path = Path(self._spool.name)

    def rows(self, start: Place = START) -> Iterator[RawRow]:
        """Yield one row per line. Blank lines at the end of the file are not rows.

        Raises:
            InputRowsError: The file does not hold JSON lines. The message names its format.
        """
        is_first = start.row == 0
        reader = LineReader(self.path, self.name)
        for number, line, offset in reader.lines_to_last(
            _BLANK, skip=start.row, offset=start.offset
        ):
            if is_first and line != b"":
                is_first = False
                if line is not None:
                    self._check_format(line)
            yield RawRow(
                where=f"{self.name}:{number}",
                position=number - 1,
                parse=partial(_parse_line, line),
                unit="line",
                offset=offset,
            )

    def count(self, stop: int | None = None) -> FileRows:
        """Count the rows; at `stop` rows, counting may end. Raises as `rows` does."""
        next(self.rows(), None)
        return count_lines(LineReader(self.path, self.name), _BLANK, stop)

    def _check_format(self, first: bytes) -> None:
        """Raise InputRowsError if the first line is not JSON and the first lines show a format."""
        try:
            parse_object(decode_line(first))
        except ValueError:
            lines = islice(LineReader(self.path, self.name).lines(), MAX_SNIFFED_LINES)
            path = "FILE" if self._spool is not None else self.name
            if (kind := describe_text([line or b"" for _, line in lines], path)) is not None:
                raise InputRowsError(f"{self.name}: is {kind}") from None

    def files(self) -> list[Location] | None:
        """Return the file, None for a pipe or standard input."""
        return None if self._spool is not None else [self.path]


def _parse_line(line: bytes | None) -> dict[str, Any]:
    if line == b"":
        raise ValueError("the line is empty; only the last lines may be")
    return parse_object(decode_line(line).rstrip("\r\n"))
