"""Reads a text file with one prompt per line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gptbatch.pipeline.input.lines import LineReader, decode_line
from gptbatch.pipeline.input.source import RawRow

TEXT_FIELD = "text"


class TextFile:
    """A file whose every line is a row {"text": line}. Blank lines at the end are not rows.

    Args:
        path: The file, plain or compressed.
        name: The file in messages.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def rows(self) -> Iterator[RawRow]:
        """Yield one row per line."""
        for number, line, _ in LineReader(self.path, self.name).lines_to_last():
            yield RawRow(
                where=f"{self.name}:{number}",
                position=number - 1,
                parse=partial(_parse_line, line),
            )


def _parse_line(line: bytes | None) -> dict[str, Any]:
    return {TEXT_FIELD: decode_line(line).removesuffix("\n").removesuffix("\r")}
