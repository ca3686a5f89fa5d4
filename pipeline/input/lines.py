"""Reads text files as lines of bytes, decompressed and with bounded length."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError, StorageError
from gptbatch.pipeline.input.compression import DAMAGE_ERRORS, open_decompressed
from gptbatch.pipeline.input.file_kind import HEAD_BYTES, describe_binary
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.object_path import ObjectReader

MAX_LINE_BYTES = 16 * 2**20
BOM = b"\xef\xbb\xbf"


class LineReader:
    """The lines of a text file, plain or compressed.

    Args:
        path: The file.
        name: The file in messages.
    """

    def __init__(self, path: Location, name: str) -> None:
        self.path, self.name = path, name
        # number of the last line that was read
        self._line = 0
        # byte after it in a file that is not compressed, else -1
        self.offset = -1

    def lines(self, *, skip: int = 0, offset: int = -1) -> Iterator[tuple[int, bytes | None]]:
        """Yield each line number from 1 and its bytes, with the line end.

        The bytes are None for a line longer than MAX_LINE_BYTES. Such a line is skipped in pieces.
        A byte order mark before line 1 is removed.

        Args:
            skip: Number of lines to skip.
            offset: The byte at which the next one begins; -1 reads the lines before it.

        Raises:
            InputRowsError: The file is damaged, or is not text.
            InputNotFoundError: Permission to read the file is missing.
            StorageError: Reading failed.
        """
        with self.open() as file:
            is_plain = isinstance(getattr(file, "raw", None), (io.FileIO, ObjectReader))
            self._line, self.offset = 0, 0 if is_plain else -1
            if skip and is_plain and offset >= 0:
                file.seek(offset)
                self._line, self.offset = skip, offset
            if not is_plain:
                self._skip_lines(file, skip)
            while line := file.readline(MAX_LINE_BYTES + 1):
                self._line += 1
                size = len(line)
                if self._line == 1:
                    line = line.removeprefix(BOM)
                is_too_long = size > MAX_LINE_BYTES and not line.endswith(b"\n")
                if is_too_long:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                        size += len(line)
                if is_plain:
                    self.offset += size
                if self._line > skip:
                    yield self._line, None if is_too_long else line

    def _skip_lines(self, file: io.BufferedReader, count: int) -> None:
        """Skip lines by counting their ends, as many buffers as hold fewer."""
        while self._line < count and (buffered := file.peek()):
            ends = buffered.count(b"\n")
            if self._line + ends >= count:
                return
            self._line += ends
            file.read(len(buffered))

    def lines_to_last(
        self, blank: bytes = b"\r\n", *, skip: int = 0, offset: int = -1
    ) -> Iterator[tuple[int, bytes | None, int]]:
        r"""Yield as `lines` does, up to the last line that is not blank, and the byte of each.

        Args:
            blank: A line of these bytes only is blank. Blank lines before the last are yielded as
                b"".
            skip: As for `lines`.
            offset: As for `lines`.
        """
        blanks: list[int] = []
        # byte at which the line begins
        begin = offset if skip else -1
        for number, line in self.lines(skip=skip, offset=offset):
            begin = 0 if number == 1 and self.offset >= 0 else begin
            if line is not None and not line.strip(blank):
                blanks.append(begin)
                begin = self.offset
                continue
            for index, place in enumerate(blanks):
                yield number - len(blanks) + index, b"", place
            blanks.clear()
            yield number, line, begin
            begin = self.offset

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
                f"{where}: the compressed file is damaged or cut off ({error}); copy it again"
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
        raise ValueError(
            f"not UTF-8 at byte {error.start + 1} of the line; if Windows or Excel wrote the file, "
            "convert it with iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
