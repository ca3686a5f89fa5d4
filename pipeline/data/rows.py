"""What every source of prompts yields: a raw row, before its fields mean anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """where: how messages name the row. line: its line number from 1, or its row number from 0.

    fields: reads the row when it is asked to; raises ValueError, saying why, for a row that cannot be read.
    """

    where: str
    line: int
    fields: Callable[[], dict[str, Any]]


class RowSource(Protocol):
    """Rows that can be read more than once, always in the same order."""

    name: str

    def rows(self) -> Iterator[RawRow]: ...

    def files(self) -> list[Path] | None:
        """The files that decide what the rows are; None when that cannot be known, and they must be read to know."""
