"""Short excerpts of two values that differ, from where they part. Imports only the library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

MAX_CHARACTERS = 60
MAX_VALUE_CHARACTERS = 24
# Of an excerpt's characters, one in this many stands before the first difference.
SHARE_BEFORE = 4


def first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the index of the first difference of two sequences, which may be the end of one."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(a), len(b)))


def excerpts(a: str, b: str, length: int = MAX_CHARACTERS) -> tuple[str, str]:
    """Return two texts from shortly before their first difference; "..." marks what is left out."""
    first = 0
    if max(len(a), len(b)) > length:
        first = max(0, first_difference(a, b) - length // SHARE_BEFORE)
    before = "..." if first else ""
    short_a, short_b = (
        before + text[first : first + length] + ("..." if len(text) > first + length else "")
        for text in (a, b)
    )
    return short_a, short_b


def value_excerpts(a: Any, b: Any) -> tuple[str, str]:
    """Return two values of settings as JSON, shortened as texts are; None is "none"."""
    text_a, text_b = (
        "none" if value is None else json.dumps(value, ensure_ascii=False) for value in (a, b)
    )
    return excerpts(text_a, text_b, MAX_VALUE_CHARACTERS)
