"""The interface of an input format: rows that are located, and not yet parsed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from gptbatch.pipeline.storage.location import Location


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row of an input.

    Attributes:
        where: The row in messages, `prompts.jsonl:3`.
        position: Position in the input or split, from 0. It is the id of a row without one.
        parse: Returns the fields. Raises ValueError with the reason where the row is malformed.
        unit: Whether people count lines, from 1, or rows, from 0.
        file: Index of its file in an input of several files.
        offset: Byte at which the row begins, in a file that can be read from there; else -1.
    """

    where: str
    position: int
    parse: Callable[[], dict[str, Any]]
    unit: Literal["line", "row"] = "row"
    file: int = 0
    offset: int = -1

    @property
    def label(self) -> str:
        """The row in the whole input: `line 3`, or `row 2`. Its place in a file is in `where`."""
        return f"line {self.position + 1}" if self.unit == "line" else f"row {self.position}"


class Place(NamedTuple):
    """Where a row begins, so that reading can start there.

    Attributes:
        position: Position of the row in the input.
        file: Index of its file.
        row: Rows before it in this file.
        offset: Byte at which it begins; -1 where the rows before it must be skipped.
    """

    position: int
    file: int
    row: int
    offset: int


START = Place(position=0, file=0, row=0, offset=-1)


class RowSource(Protocol):
    """Rows that can be read more than once, always in the same order.

    Attributes:
        name: The source in messages.
    """

    name: str

    def rows(self, start: Place = START) -> Iterator[RawRow]:
        """Yield the rows in order, from a place that an earlier pass has found."""

    def files(self) -> Sequence[Location] | None:
        """Return the files that determine the rows; None where only reading them can tell."""
