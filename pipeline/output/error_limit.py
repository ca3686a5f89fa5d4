"""The limit on error rows, `max_row_errors`. It holds for all rows of a job together."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from gptbatch.pipeline.errors import InputRowsError


class ErrorLimitError(InputRowsError):
    """There are more error rows than `max_row_errors` allows."""


@dataclass(frozen=True, slots=True)
class ErrorLimit:
    """The limit on error rows.

    Attributes:
        setting: max_row_errors: "5", or "2.5%" of `rows`. None allows any number.
        rows: Rows of the input.
    """

    setting: str | None
    rows: int

    @property
    def max_errors(self) -> int:
        """The largest allowed number of error rows."""
        if self.setting is None:
            return self.rows
        if self.setting.endswith("%"):
            return int(Fraction(self.setting[:-1]) * self.rows / 100)
        return int(self.setting)

    def check(self, errors: int) -> None:
        """Check a number of error rows.

        Raises:
            ErrorLimitError: It exceeds the limit.
        """
        if errors > self.max_errors:
            raise ErrorLimitError(
                f"{errors} of {self.rows} rows are errors, more than max_row_errors "
                f"({self.setting}) allows; what is written stays, and the same command with a "
                "larger one goes on"
            )
