"""The text of an exception for a one-line message."""

from __future__ import annotations

_MAX_CHARACTERS = 200


def first_line(error: BaseException) -> str:
    """Return the first line of an error, at most 200 characters; its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_MAX_CHARACTERS]
