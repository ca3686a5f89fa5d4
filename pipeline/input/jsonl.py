"""A strict reader of JSON lines that guesses nothing.

A line ends at \\n and nowhere else, is UTF-8 and holds one JSON object with no key twice. Numbers stay the text that they
are in the file (`NumberText`), so that none is rounded or turned into another type.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError
from gptbatch.pipeline.input.file_kind import describe_text
from gptbatch.pipeline.input.lines import MAX_LINE_BYTES, LineReader
from gptbatch.pipeline.input.source import RawRow

MAX_NESTING = 100
SNIFFED_LINES = 20


class NumberText(str):
    """A JSON number as it is written."""


class JsonlFile:
    """A file of JSON lines, plain or compressed. `-` is standard input.

    Standard input and pipes are copied to a temporary file, since the rows are read twice.

    Raises:
        InputNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        """name: the file as messages name it; None takes its path."""
        self.path = Path(path)
        self.name = name or ("<stdin>" if str(path) == "-" else str(path))
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
        """One RawRow per line; blank lines at the end are none.

        Raises:
            InputRowsError: the file holds no JSON lines at all; the message says what it is.
        """
        blanks = 0  # blank lines in a row, which are rows only where another line follows
        sniffed = False
        for number, line in LineReader(self.path, self.name).lines():
            if line is not None and not line.strip(b" \t\r\n"):
                blanks += 1
                continue
            if not sniffed:
                self._sniff(line)
                sniffed = True
            for blank in range(number - blanks, number):
                yield self._row(blank, _blank)
            blanks = 0
            yield self._row(number, _too_long if line is None else partial(parse_object, line))

    def _sniff(self, first: bytes | None) -> None:
        try:
            if first is not None:
                parse_object(first)
        except ValueError:
            head = islice(LineReader(self.path, self.name).lines(), SNIFFED_LINES)
            kind = describe_text(
                [line or b"" for _, line in head], "FILE" if self._spool is not None else self.name
            )
            if kind is not None:
                raise InputRowsError(f"{self.name}: is {kind}") from None

    def files(self) -> list[Path] | None:
        """None for what was read from a pipe."""
        return None if self._spool is not None else [self.path]

    def _row(self, number: int, fields: Callable[[], dict[str, Any]]) -> RawRow:
        return RawRow(where=f"{self.name}:{number}", line=number, position=number - 1, parse=fields)


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
        value = DECODER.decode(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        ) from None
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
        return (
            "{"
            + ", ".join(
                f"{to_json(key)}: {to_json(item, depth + 1)}" for key, item in value.items()
            )
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(to_json(item, depth + 1) for item in value) + "]"
    if isinstance(value, str):
        check_utf8(value)
    return _ENCODER.encode(value)


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


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # json.dumps makes one per call
DECODER = json.JSONDecoder(
    parse_float=NumberText,
    parse_int=NumberText,
    parse_constant=_no_constant,
    object_pairs_hook=_object,
)
