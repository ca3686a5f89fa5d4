"""What every source of prompts yields: a raw row, before its fields mean anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """Either `fields` or `error`. where: how messages name the row. line: its line number, or its row number from 0."""

    where: str
    line: int
    fields: dict[str, Any] | None = None
    error: str | None = None


class RowSource(Protocol):
    """Rows that can be read more than once, always in the same order."""

    name: str

    def rows(self) -> Iterator[RawRow]: ...
