"""The text of an exception for a one-line message."""

from __future__ import annotations

import re

MAX_CHARACTERS = 300
# sentences shorter than this are no message of their own
MIN_CHARACTERS = MAX_CHARACTERS // 2
# a sentence follows, unlike the point of an abbreviation
_SENTENCE_END = re.compile(r"[.!?](?=\s[A-Z\"'`])")


def first_line(error: BaseException) -> str:
    """Return the first line of an error; its type where it has no text.

    See `shortened` for long lines.
    """
    return shortened((str(error).strip() or type(error).__name__).splitlines()[0])


def shortened(line: str) -> str:
    """Return the whole sentences at the start of a line, at most 300 characters.

    Where these are fewer than 150 characters, words follow, and an ellipsis.
    """
    if len(line) <= MAX_CHARACTERS:
        return line
    ends = [match.end() for match in _SENTENCE_END.finditer(line[: MAX_CHARACTERS + 2])]
    if ends and ends[-1] >= MIN_CHARACTERS:
        return line[: ends[-1]]
    start = line[: MAX_CHARACTERS - 4]
    return f"{start.rpartition(' ')[0] or start} ..."
