"""A JSON file that holds an array of objects, and a text file with a row per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.input.file_kind import describe_object, describe_text
from gptbatch.pipeline.input.jsonl import DECODER, MAX_NESTING, SNIFFED_LINES, JsonlFile, json_type
from gptbatch.pipeline.input.lines import BOM, MAX_LINE_BYTES, LineReader
from gptbatch.pipeline.input.source import RawRow

TEXT_FIELD = "text"
_SPACE = " \t\r\n"


class JsonFile:
    """An array of objects, each a row, numbers as NumberText; or JSON lines under a name that ends in .json.

    An array is held in memory as text while it is read.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def rows(self) -> Iterator[RawRow]:
        """Raises InputRowsError where the text is no JSON, since no row is told from the next behind that."""
        with LineReader(self.path, self.name).reading() as file:
            first = next(
                (
                    byte
                    for line in iter(lambda: file.read(4096), b"")
                    if (byte := line.removeprefix(BOM).lstrip()[:1])
                ),
                b"",
            )
        if not first:
            raise InputRowsError(f"{self.name}: is empty, which no JSON is; it was cut off")
        if first != b"[":
            head = [
                line or b""
                for _, line in islice(LineReader(self.path, self.name).lines(), SNIFFED_LINES)
            ]
            if describe_text(head, self.name) is not None:
                raise InputRowsError(f"{self.name}: is {describe_object(self._text(), self.name)}")
            yield from JsonlFile(self.path, self.name).rows()
            return
        text = self._text()
        position, at = 0, _skip(text, 0)
        at = _skip(text, at + 1)
        while not text.startswith("]", at):
            if position:
                if not text.startswith(",", at):
                    raise self._damaged(text, at, "a comma or the end of the array is needed")
                at = _skip(text, at + 1)
            try:
                value, end = DECODER.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise self._damaged(text, error.pos, error.msg) from None
            except RecursionError:
                raise self._damaged(text, at, f"nested deeper than {MAX_NESTING} levels") from None
            except ValueError as error:
                raise self._damaged(text, at, str(error)) from None
            yield RawRow(
                where=f"{self.name} row {position}",
                line=position,
                position=position,
                parse=partial(_object, value),
            )
            position, at = position + 1, _skip(text, end)
        if (rest := _skip(text, at + 1)) < len(text):
            raise self._damaged(text, rest, "text stands behind the array")

    def _text(self) -> str:
        with LineReader(self.path, self.name).reading() as file:
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
        return InputRowsError(
            f"{self.name}:{line}: {reason} at column {column}{'; is it cut off?' if at >= len(text) - 1 else ''}"
        )


class PlainTextFile:
    """Every line is a row {"text": line}. Blank lines at the end are none."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def rows(self) -> Iterator[RawRow]:
        blanks = 0
        for number, line in LineReader(self.path, self.name).lines():
            if line is not None and not line.strip(b"\r\n"):
                blanks += 1
                continue
            for blank in range(number - blanks, number):
                yield self._row(blank, b"")
            blanks = 0
            yield self._row(number, line)

    def _row(self, number: int, line: bytes | None) -> RawRow:
        return RawRow(
            where=f"{self.name}:{number}",
            line=number,
            position=number - 1,
            parse=partial(_text_fields, line),
        )


def _text_fields(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        return {TEXT_FIELD: line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, not {json_type(value)}")
    return dict(value)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at
