"""What every source of prompts yields: a raw row, before its fields mean anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row of an input.

    where: the row as messages name it. line: its line number from 1, or its row number from 0. place: its place from 0 in the
    file or split, which is its id where it has none. fields: parses the row; raises ValueError with the reason.
    """

    where: str
    line: int
    place: int
    fields: Callable[[], dict[str, Any]]


class RowSource(Protocol):
    """Rows that can be read more than once, always in the same order."""

    name: str

    def rows(self) -> Iterator[RawRow]: ...

    def files(self) -> list[Path] | None:
        """The files that decide what the rows are; None when that cannot be known, and they must be read to know."""
