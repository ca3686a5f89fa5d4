"""Short excerpts of two values, from where they first differ. Imports only the library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

MAX_CHARACTERS = 60
MAX_VALUE_CHARACTERS = 24
# Of an excerpt's characters, one in this many stands before the first difference.
SHARE_BEFORE = 4
ELLIPSIS = "..."


def first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the index of the first difference of two sequences, which may be the end of one."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))


def excerpts(a: str, b: str, length: int = MAX_CHARACTERS) -> tuple[str, str]:
    """Return two texts from shortly before their first difference, in at most `length` characters.

    An ellipsis marks what is left out, and counts.
    """
    if max(len(a), len(b)) <= length:
        return a, b
    first = first_difference(a, b) - length // SHARE_BEFORE
    return _shortened(a, first, length), _shortened(b, first, length)


def _shortened(text: str, first: int, length: int) -> str:
    """Return a text from the character `first` on, in at most `length` characters."""
    if first > len(ELLIPSIS):
        text = ELLIPSIS + text[first:]
    return text if len(text) <= length else text[: length - len(ELLIPSIS)] + ELLIPSIS


def value_excerpts(a: Any, b: Any) -> tuple[str, str]:
    """Return two values of settings as JSON, shortened as texts are; None is "none"."""
    text_a, text_b = (
        "none" if value is None else json.dumps(value, ensure_ascii=False) for value in (a, b)
    )
    return excerpts(text_a, text_b, MAX_VALUE_CHARACTERS)
