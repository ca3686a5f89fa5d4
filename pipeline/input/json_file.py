"""Reads a JSON file that holds an array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.input.file_kind import MAX_SNIFFED_LINES, describe_object, describe_text
from gptbatch.pipeline.input.jsonl import JsonlFile
from gptbatch.pipeline.input.lines import BOM, LineReader
from gptbatch.pipeline.input.source import RawRow
from gptbatch.pipeline.input.strict_json import DECODER, MAX_NESTING, require_object

_SPACE = " \t\r\n"


class JsonFile:
    """An array of objects, one row each, or JSON lines under a name that ends in .json.

    The text of an array is held in memory while it is read.

    Args:
        path: The file, plain or compressed.
        name: The file in messages.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def rows(self) -> Iterator[RawRow]:
        """Yield one row per object.

        Raises:
            InputRowsError: The text is not valid JSON, so that the rows after the error cannot be
                separated.
        """
        first = self._first_byte()
        if not first:
            raise InputRowsError(f"{self.name}: is empty, which no JSON is; it was cut off")
        if first == b"[":
            yield from self._array_rows(self._text())
            return
        lines = islice(LineReader(self.path, self.name).lines(), MAX_SNIFFED_LINES)
        if describe_text([line or b"" for _, line in lines], self.name) is not None:
            raise InputRowsError(f"{self.name}: is {describe_object(self._text(), self.name)}")
        yield from JsonlFile(self.path, self.name).rows()

    def _first_byte(self) -> bytes:
        """Return the first byte that is neither space nor a byte order mark, b"" without one."""
        with LineReader(self.path, self.name).open() as file:
            while chunk := file.read(4096):
                if byte := chunk.removeprefix(BOM).lstrip()[:1]:
                    return byte
        return b""

    def _array_rows(self, text: str) -> Iterator[RawRow]:
        position = 0
        at = _skip_space(text, _skip_space(text, 0) + 1)
        while not text.startswith("]", at):
            if position:
                if not text.startswith(",", at):
                    raise self._damaged(text, at, "a comma or the end of the array is needed")
                at = _skip_space(text, at + 1)
            value, end = self._parse_at(text, at)
            yield RawRow(
                where=f"{self.name} row {position}",
                position=position,
                parse=partial(_copy_object, value),
            )
            position, at = position + 1, _skip_space(text, end)
        if (rest := _skip_space(text, at + 1)) < len(text):
            raise self._damaged(text, rest, "text follows the array")

    def _parse_at(self, text: str, at: int) -> tuple[Any, int]:
        """Return the value that begins at an index, and the index after it."""
        try:
            return DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise self._damaged(text, error.pos, error.msg) from None
        except RecursionError:
            raise self._damaged(text, at, f"nested deeper than {MAX_NESTING} levels") from None
        except ValueError as error:
            raise self._damaged(text, at, str(error)) from None

    def _text(self) -> str:
        with LineReader(self.path, self.name).open() as file:
            content = file.read()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise InputRowsError(
                f"{self.name}:{line}: not UTF-8 at byte {error.start + 1} of the file"
            ) from None

    def _damaged(self, text: str, at: int, reason: str) -> InputRowsError:
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        reason = reason if reason.startswith("not valid JSON") else f"not valid JSON: {reason}"
        hint = "; is it cut off?" if at >= len(text) - 1 else ""
        return InputRowsError(f"{self.name}:{line}: {reason} at column {column}{hint}")


def _copy_object(value: Any) -> dict[str, Any]:
    return dict(require_object(value))


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at
