"""The fields of a row: exact types and ranges, and the words for what is wrong with them.

Knows: values of JSON and of datasets. Does not know: rows. Messages name the field and, prompts aside, the value.
"""

from __future__ import annotations

import math
import re
from typing import Any

from pipeline.data.jsonl import NumberText, check_utf8, json_type, shorten
from pipeline.records import MAX_TEMPERATURE

_INTEGER = re.compile(r"-?[0-9]+")


def parse_id(value: Any, index: int) -> str:
    if value is None:
        return str(index)
    if isinstance(value, str) and not isinstance(value, NumberText):
        if not value:
            raise ValueError("id must not be empty; leave it out to use the row index")
        check_utf8(value)
        return value
    if isinstance(value, (NumberText, int, float)) and not isinstance(value, bool):
        integer = _whole(value)
        if integer is not None:
            return str(integer)
    raise ValueError(f"id must be a string or a whole number, not {_seen(value)}")


def parse_integer(value: Any, name: str, low: int, high: int) -> int | None:
    if value is None:
        return None
    integer = _whole(value) if isinstance(value, (NumberText, int, float)) and not isinstance(value, bool) else None
    if integer is None:
        raise ValueError(f"{name} must be a whole number, not {_seen(value)}")
    if not low <= integer <= high:
        raise ValueError(f"{name} must be {low} to {high}, not {shorten(integer)}")
    return integer


def parse_temperature(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (NumberText, int, float)):
        raise ValueError(f"temperature must be a number, not {_seen(value)}")
    temperature = float(value)
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature must be 0 to {MAX_TEMPERATURE}, not {shorten(value)}")
    return temperature


def _whole(value: NumberText | int | float) -> int | None:
    """5 is whole and "5.0" in a JSONL line is not; a float of a dataset may be, since CSV with gaps has no integers."""
    if isinstance(value, NumberText):
        return int(value) if _INTEGER.fullmatch(value) and len(value) <= 100 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value


def _seen(value: Any) -> str:
    """A value as a message may show it: numbers and short strings whole, all else by its type."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return json_type(value)
    return f"the string {shorten(value)}" if type(value) is str else shorten(value)


def plain(value: Any) -> Any:
    """Values of a dataset that JSON has no form for: NaN, a gap, is null; dates and the like are their text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value)
