"""The message that lists the bad rows of an input: one line per reason."""

from __future__ import annotations

import re
from collections import Counter

from gptbatch.pipeline.input.rows import BadRow
from gptbatch.pipeline.system.nouns import noun

MAX_NAMED_REASONS = 20
MAX_NAMED_ROWS_PER_REASON = 6
_LOCATION = re.compile(r"(.*(?::| row ))(\d+)", re.DOTALL)


class BadRows:
    """Counts bad rows by reason and keeps the first rows of each reason."""

    def __init__(self) -> None:
        self.count = 0
        self._rows: dict[str, list[BadRow]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, row: BadRow) -> None:
        """Count one row."""
        self.count += 1
        if row.reason in self._rows or len(self._rows) < MAX_NAMED_REASONS:
            self._counts[row.reason] += 1
            rows = self._rows.setdefault(row.reason, [])
            if len(rows) < MAX_NAMED_ROWS_PER_REASON:
                rows.append(row)

    def summary(self, rows: int) -> str:
        """Return the share of bad rows: `2 of 4 rows are bad`."""
        return f"{self.count} of {rows} {noun(rows, 'row')} {noun(self.count, 'is', 'are')} bad"

    def describe(self) -> str:
        """Return a line per reason in row order: the first row, then numbers of other rows."""
        lines = []
        for reason, rows in sorted(self._rows.items(), key=lambda item: item[1][0].index):
            first, *others = rows
            more = self._counts[reason] - len(rows)
            also = [_number(row.where, first.where) for row in others]
            also += [f"{more} more"] if more else []
            suffix = f" (also {', '.join(also)})" if also else ""
            lines.append(f"{first.where}: {reason}{suffix}")
        if more := self.count - self._counts.total():
            lines.append(f"... and {more} more")
        return "\n".join(lines)


def _number(where: str, first: str) -> str:
    """`5` for a row in the file of the first row, `b.csv:5` for another file."""
    match = _LOCATION.fullmatch(where)
    return match[2] if match and first.startswith(match[1]) else where
