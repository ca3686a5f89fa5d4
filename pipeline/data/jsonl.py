"""A strict reader of JSON lines that guesses nothing.

A line ends at \\n and nowhere else, is UTF-8 and holds one JSON object with no key twice. Numbers stay the text that they
are in the file (`NumberText`), so that none is rounded or turned into another type.

Knows: bytes and JSON. Does not know: what the fields mean.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn, cast

from pipeline.data.rows import RawRow
from pipeline.errors import InputNotFoundError, InputRowsError

MAX_LINE_BYTES = 16 * 2**20
MAX_NESTING = 100
_BOM = b"\xef\xbb\xbf"


class NumberText(str):
    """A JSON number as it is written."""


class JsonlFile:
    """A file of JSON lines, plain, `.gz` or `.zst`; `-` is standard input, which like any pipe is kept in a temporary file to be
    read twice.

    Raises InputNotFoundError when there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = "<stdin>" if str(path) == "-" else str(path)
        self._spool: IO[bytes] | None = None
        if str(path) == "-":
            if sys.stdin is None:
                raise InputNotFoundError("<stdin>: is closed")
            self._keep(sys.stdin.buffer)
        elif self.path.is_dir():
            raise InputNotFoundError(f"{self.name}: is a folder; name a file, or use --dataset")
        elif not self.path.exists():
            raise InputNotFoundError(f"{self.name}: no such file")
        elif not self.path.is_file():
            with self.path.open("rb") as pipe:
                self._keep(pipe)

    def _keep(self, stream: BinaryIO) -> None:
        """Copy what can be read only once (standard input, a pipe) to a file that lives as long as this object."""
        self._spool = tempfile.NamedTemporaryFile(prefix="gptbatch-input-")  # noqa: SIM115
        shutil.copyfileobj(stream, self._spool)
        self._spool.flush()
        self.path = Path(self._spool.name)

    def rows(self) -> Iterator[RawRow]:
        """One RawRow for each line; blank lines at the end are none."""
        blanks = 0  # blank lines in a row, which are rows only where another line follows
        for number, line in self._lines():
            if line is not None and not line.strip(b" \t\r\n"):
                blanks += 1
                continue
            for blank in range(number - blanks, number):
                yield self._row(blank, _blank)
            blanks = 0
            yield self._row(number, _too_long if line is None else partial(parse_object, line))

    def files(self) -> list[Path] | None:
        """None for what was read from a pipe."""
        return None if self._spool is not None else [self.path]

    def _where(self, number: int) -> str:
        return f"{self.name}:{number}"

    def _row(self, number: int, fields: Callable[[], dict[str, Any]]) -> RawRow:
        return RawRow(where=self._where(number), line=number, fields=fields)

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """(line number from 1, its bytes); None for a line over the cap, which is skipped without being kept."""
        number = 0
        try:
            with self._open() as file:
                while line := file.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if number == 1:
                        if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                            raise InputRowsError(f"{self._where(1)}: the file is UTF-16; convert it to UTF-8")
                        if line.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
                            raise InputRowsError(f"{self._where(1)}: the file is compressed; its name must end in .gz or .zst")
                        line = line.removeprefix(_BOM)
                    if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                        while line and not line.endswith(b"\n"):
                            line = file.readline(MAX_LINE_BYTES)
                        yield number, None
                    else:
                        yield number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputRowsError(f"{self._where(number + 1)}: the gzip file is damaged or cut off ({error})") from error
        except PermissionError as error:
            raise InputNotFoundError(f"{self.name}: may not be read ({error.strerror})") from error

    def _open(self) -> BinaryIO:
        if self.path.suffix in (".gz", ".zst") and self.path.stat().st_size == 0:
            raise InputRowsError(f"{self.name}: is empty, which no compressed file is; it was cut off")
        if self.path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(self.path, "rb"))
        if self.path.suffix == ".zst":
            return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, _ZstFile(self))))
        return self.path.open("rb")


class _ZstFile(io.RawIOBase):
    """A .zst file as a raw stream for io.BufferedReader."""

    def __init__(self, source: JsonlFile) -> None:
        import pyarrow

        self._name = source.name
        self._errors = (OSError, pyarrow.ArrowException)
        self._stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(source.path)), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            chunk = self._stream.read(len(buffer))
        except self._errors as error:
            raise InputRowsError(f"{self._name}: the zst file is damaged or cut off ({error})") from error
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _blank() -> NoReturn:
    raise ValueError("the line is empty; only the last lines may be")


def _too_long() -> NoReturn:
    raise ValueError(f"the line is longer than {MAX_LINE_BYTES} bytes")


# -- one line --------------------------------------------------------------------------------------------------------


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of one line, numbers as NumberText. Raises ValueError that says what is wrong, not what it says."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    try:
        value = _DECODER.decode(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, not {json_type(value)}")
    return value


def to_json(value: Any, depth: int = 0) -> str:
    """JSON text of a parsed value, numbers as they were written. Raises ValueError for what JSON or UTF-8 cannot hold."""
    if depth > MAX_NESTING:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels")
    if isinstance(value, NumberText):
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{to_json(key)}: {to_json(item, depth + 1)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(to_json(item, depth + 1) for item in value) + "]"
    if isinstance(value, str):
        check_utf8(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def check_utf8(text: str) -> None:
    """Raises ValueError for a lone surrogate, which an escape such as \\ud800 can bring in and UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate (U+{ord(text[error.start]):04X}) is not text") from None


def json_type(value: Any) -> str:
    """The JSON name of a parsed value's type, for messages that must not show the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (NumberText, int, float)):
        return "a number"
    names: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shorten(key)} stands twice in one object")
            seen.add(key)
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"not valid JSON: {name} is no JSON number")


def shorten(value: Any) -> str:
    """A value as it may stand in a message: at most 40 characters, printable."""
    text = repr(value) if type(value) is str else str(value)
    return text if len(text) <= 40 else text[:40] + "..."


_DECODER = json.JSONDecoder(parse_float=NumberText, parse_int=NumberText, parse_constant=_no_constant, object_pairs_hook=_object)
