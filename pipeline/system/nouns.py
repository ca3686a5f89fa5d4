"""The noun for a count in a message."""

from __future__ import annotations


def noun(count: int, one: str, many: str | None = None) -> str:
    """Return the noun for a count: `row` for 1, and `rows` for others.

    Args:
        count: The count.
        one: The noun for 1.
        many: The noun for other counts. None appends an s.
    """
    return one if count == 1 else many or f"{one}s"
