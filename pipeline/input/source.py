"""The interface of an input format: rows that are located, and not yet parsed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row of an input.

    Attributes:
        where: The row in messages, `prompts.jsonl:3`.
        line: Line number from 1, or row number from 0.
        position: Position in the file or split, from 0. It is the id of a row without one.
        parse: Returns the fields. Raises ValueError with the reason where the row is malformed.
    """

    where: str
    line: int
    position: int
    parse: Callable[[], dict[str, Any]]


class RowSource(Protocol):
    """Rows that can be read more than once, always in the same order."""

    name: str

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows in order."""

    def files(self) -> list[Path] | None:
        """Return the files that determine the rows; None where only reading them can tell."""
