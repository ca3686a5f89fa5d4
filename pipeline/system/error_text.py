"""The text of an exception for a one-line message."""

from __future__ import annotations

import re

MAX_CHARACTERS = 300
_SENTENCE_END = re.compile(r"[.!?](?=\s)")


def first_line(error: BaseException) -> str:
    """Return the first line of an error; its type where it has no text.

    See `shortened` for long lines.
    """
    return shortened((str(error).strip() or type(error).__name__).splitlines()[0])


def shortened(line: str) -> str:
    """Return the whole sentences at the start of a line, at most 300 characters.

    Where the first sentence is longer, its words are followed by an ellipsis.
    """
    if len(line) <= MAX_CHARACTERS:
        return line
    start = line[: MAX_CHARACTERS + 1]
    if ends := [match.end() for match in _SENTENCE_END.finditer(start)]:
        return start[: ends[-1]]
    start = start[: MAX_CHARACTERS - 4]
    return f"{start.rpartition(' ')[0] or start} ..."
