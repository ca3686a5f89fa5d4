"""Parses split expressions: `train`, `train[:100]`, `train[50%:]`, `train[:10]+test[-10:]`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_PART = re.compile(
    r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]"
    r"(\((?P<rounding>closest|pct1_dropremainder)\))?)?"
)


@dataclass(frozen=True, slots=True)
class SplitPart:
    """One term of a split expression.

    Attributes:
        name: Name of the split.
        start: First row as written: "10", "-5" or "50%". None starts at the first row.
        stop: Row after the last, written in the same way. None stops after the last row.
        drop_remainder: Percentages are multiples of `rows // 100`.
    """

    name: str
    start: str | None = None
    stop: str | None = None
    drop_remainder: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the term is a split without bounds."""
        return self.start is None and self.stop is None

    @property
    def needs_length(self) -> bool:
        """Whether the bounds depend on the number of rows of the split."""
        return any(
            bound is not None and ("%" in bound or "-" in bound)
            for bound in (self.start, self.stop)
        )

    def bounds(self, length: int) -> tuple[int, int]:
        """Return the rows [start, stop) of a split of `length` rows, clipped to the split."""
        start, stop = (
            default if bound is None else self._row(bound, length)
            for bound, default in ((self.start, 0), (self.stop, length))
        )
        return start, max(start, stop)

    def _row(self, bound: str, length: int) -> int:
        if bound.endswith("%"):
            percent = int(bound[:-1])
            row = (
                percent * math.trunc(length / 100)
                if self.drop_remainder
                else round(percent * length / 100)
            )
        else:
            row = int(bound)
        return min(length, max(0, row + length if row < 0 or bound.startswith("-0") else row))


def parse_split(text: str) -> list[SplitPart]:
    """Parse a split expression into its terms. Raises ValueError for a syntax error."""
    parts = []
    for term in text.split("+"):
        match = _PART.fullmatch(term.strip())
        if match is None:
            raise ValueError(
                f"{term!r} is no split; write train, train[:100], train[50%:] or train+test"
            )
        for bound in (match["start"], match["stop"]):
            if bound is not None and bound.endswith("%") and not -100 <= int(bound[:-1]) <= 100:
                raise ValueError(f"{term!r}: percentages are -100% to 100%")
        rounding = match["rounding"]
        parts.append(
            SplitPart(
                match["name"], match["start"], match["stop"], rounding == "pct1_dropremainder"
            )
        )
    return parts
