"""Reads text files as lines of bytes, decompressed and with bounded length."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError, StorageError
from gptbatch.pipeline.input.compression import DAMAGE_ERRORS, open_decompressed
from gptbatch.pipeline.input.file_kind import HEAD_BYTES, describe_binary

MAX_LINE_BYTES = 16 * 2**20
BOM = b"\xef\xbb\xbf"


class LineReader:
    """The lines of a text file, plain or compressed.

    Args:
        path: The file.
        name: The file in messages.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        # number of the last line that was read
        self._line = 0

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield each line number from 1 and its bytes, with the line end.

        The bytes are None for a line longer than MAX_LINE_BYTES. Such a line is skipped in pieces.
        A byte order mark before line 1 is removed.

        Raises:
            InputRowsError: The file is damaged, or is not text.
            InputNotFoundError: Permission to read the file is missing.
            StorageError: Reading failed.
        """
        self._line = 0
        with self.open() as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                self._line += 1
                if self._line == 1:
                    line = line.removeprefix(BOM)
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                    yield self._line, None
                else:
                    yield self._line, line

    def lines_to_last(self, blank: bytes = b"\r\n") -> Iterator[tuple[int, bytes | None]]:
        r"""Yield as `lines` does, up to the last line that is not blank.

        Args:
            blank: A line of these bytes only is blank. Blank lines before the last are yielded as
                b"".
        """
        blanks = 0
        for number, line in self.lines():
            if line is not None and not line.strip(blank):
                blanks += 1
                continue
            for blank_number in range(number - blanks, number):
                yield blank_number, b""
            blanks = 0
            yield number, line

    @contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """Open the decompressed content. Raises as `lines` does."""
        try:
            with open_decompressed(self.path, self.name) as file:
                head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
                if (kind := describe_binary(head, self.name)) is not None:
                    raise InputRowsError(f"{self.name}: is {kind}")
                yield file
        except DAMAGE_ERRORS as error:
            where = f"{self.name}:{self._line + 1}" if self._line else self.name
            raise InputRowsError(
                f"{where}: the compressed file is damaged or cut off ({error})"
            ) from error
        except PermissionError as error:
            raise InputNotFoundError(f"{self.name}: may not be read ({error.strerror})") from error
        except OSError as error:
            raise StorageError(
                f"{self.name}: reading failed after line {self._line} ({error.strerror or error})"
            ) from error


def decode_line(line: bytes | None) -> str:
    """Decode a line of `LineReader.lines`. Raises ValueError where it is too long or not UTF-8."""
    if line is None:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from None
