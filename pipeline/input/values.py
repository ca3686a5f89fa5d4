"""Parses and converts the values of a row: ids, sampling settings, and metadata as JSON.

Messages contain the name of the field and the value.
"""

from __future__ import annotations

import decimal
import math
import re
import uuid
from collections.abc import Callable
from typing import Any

from gptbatch.pipeline.input.csv_file import CellText
from gptbatch.pipeline.input.strict_json import (
    NumberText,
    check_utf8,
    json_type,
    parse_value,
    shorten,
)
from gptbatch.pipeline.params.settings import MAX_TOKEN_ID, SamplingSetting, text_problem

MISSING = object()
_NO_SETTING = "; if {} is no setting here, name those that are with --row-settings (none: no field)"
_NUMBERS = (NumberText, CellText, int, float, decimal.Decimal)
_INTEGER = re.compile(r"-?[0-9]+")
_TOKEN_KEY = re.compile(r"0|[1-9][0-9]{0,9}")
_CELL_INTEGER = re.compile(r"(-?[0-9]+)(\.0+)?")
_CELL_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
# every whole number below it is a float64; Float32 and Float16 have smaller limits
_EXACT_BELOW = 2**53


def is_null(value: Any) -> bool:
    """Return whether a field has no value: null, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def parse_id(value: Any, position: int) -> str:
    """Return the id of a row, its position where the value is null. Raises ValueError."""
    if is_null(value):
        return str(position)
    if isinstance(value, str) and not isinstance(value, NumberText):
        if not value:
            raise ValueError("id must not be empty; leave it out to use the row index")
        check_utf8(value)
        return str(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, (NumberText, int, float, decimal.Decimal)) and not isinstance(value, bool):
        integer = _whole(value, "id")
        if integer is not None:
            return str(integer)
    raise ValueError(f"id must be a string or a whole number, not {_shown(value)}")


def parse_setting(value: Any, name: str, setting: SamplingSetting) -> Any:
    """Return the value of a sampling setting, in the form of SamplingParams.

    A cell of a CSV file holds a list or an object as JSON. One string or token id stands for a list
    of one.

    Raises:
        ValueError: It has another type or is out of range.
    """
    match setting.kind:
        case "int" | "float":
            return _parse_in_range(value, name, setting)
        case "bool":
            return _parse_switch(value, name)
        case "texts":
            return tuple(_parse_text(item, name) for item in _items(value, name, setting))
        case "token_ids":
            return tuple(_parse_token_id(item, name) for item in _items(value, name, setting))
        case "token_values":
            return _parse_token_values(value, name, setting)


def _parse_in_range(value: Any, name: str, setting: SamplingSetting) -> int | float:
    parse = _parse_integer if setting.kind == "int" else _parse_number
    number = parse(value, name)
    if not setting.accepts_number(number):
        shown = number if setting.kind == "int" else value
        hint = "" if isinstance(value, NumberText) else _NO_SETTING.format(name)
        raise ValueError(f"{name} must be {setting.range_text}, not {shorten(shown)}{hint}")
    return number


def _parse_switch(value: Any, name: str) -> bool:
    if isinstance(value, CellText) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {_shown(value)}{_advice(value, name)}")
    return value


def _items(value: Any, name: str, setting: SamplingSetting) -> list[Any]:
    """Return the items of a list; one value is a list of one."""
    if isinstance(value, CellText) and value.startswith("["):
        try:
            value = _from_json(value, name)
        except ValueError:
            # A text may begin with a bracket: [END]
            if setting.kind != "texts":
                raise
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(items) > setting.max_items:
        raise ValueError(f"{name} has {len(items)} items; at most {setting.max_items} are possible")
    return items


def _parse_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or isinstance(value, NumberText):
        raise ValueError(
            f"{name} must be a string or a list of strings, not {_shown(value)}"
            f"{_advice(value, name)}"
        )
    check_utf8(value)
    if problem := text_problem(value):
        raise ValueError(f"{name} {problem}")
    return str(value)


def _parse_token_id(value: Any, name: str) -> int:
    token = _parse_integer(value, name)
    if not 0 <= token <= MAX_TOKEN_ID:
        raise ValueError(f"{name} must hold token ids from 0, not {token}")
    return token


def _parse_token_values(
    value: Any, name: str, setting: SamplingSetting
) -> tuple[tuple[int, float], ...]:
    if isinstance(value, CellText):
        value = _from_json(value, name)
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        # a map column of a table
        value = {str(token): item for token, item in value}
    if not isinstance(value, dict):
        raise ValueError(
            f'{name} must be an object of numbers by token id, such as {{"50256": -100}}, not '
            f"{_shown(value)}{_advice(value, name)}"
        )
    # A table has the same keys in all rows, null where a row lacks one.
    numbers = {key: item for key, item in value.items() if not is_null(item)}
    if bad := [key for key in numbers if not _TOKEN_KEY.fullmatch(key)]:
        raise ValueError(f"{name} must have token ids as keys, not {shorten(bad[0])}")
    if len(numbers) > setting.max_items:
        raise ValueError(
            f"{name} has {len(numbers)} tokens; at most {setting.max_items} are possible"
        )
    return tuple(
        sorted(
            (_parse_token_id(int(key), name), float(_parse_in_range(item, name, setting)))
            for key, item in numbers.items()
        )
    )


def _from_json(cell: str, name: str) -> Any:
    """Return the value of a CSV cell that holds JSON."""
    try:
        return parse_value(cell)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from error


def _parse_integer(value: Any, name: str) -> int:
    integer = (
        _whole(value, name) if isinstance(value, _NUMBERS) and not isinstance(value, bool) else None
    )
    if integer is None:
        raise ValueError(
            f"{name} must be a whole number, not {_shown(value)}{_advice(value, name)}"
        )
    return integer


def _parse_number(value: Any, name: str) -> float:
    is_number = isinstance(value, (NumberText, int, float, decimal.Decimal)) or (
        isinstance(value, CellText) and _CELL_NUMBER.fullmatch(value)
    )
    if isinstance(value, bool) or not is_number:
        raise ValueError(f"{name} must be a number, not {_shown(value)}{_advice(value, name)}")
    return float(value)


def _whole(value: NumberText | CellText | int | float | decimal.Decimal, name: str) -> int | None:
    """Return a whole number, None where the value is not one.

    5.0 is not whole in JSON. It is whole in a table, where columns with nulls have no integers.
    Raises ValueError for a float so large that it may be a rounded integer.
    """
    if isinstance(value, NumberText):
        return int(value) if _INTEGER.fullmatch(value) and len(value) <= 100 else None
    if isinstance(value, CellText):
        match = _CELL_INTEGER.fullmatch(value)
        if match is None and _CELL_NUMBER.fullmatch(value) and len(value) <= 100:
            return _whole(float(value), name)
        if match is None or len(value) > 100:
            return None
        return _whole(float(value), name) if match[2] else int(match[1])
    if isinstance(value, decimal.Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else None
    if isinstance(value, float):
        if math.isfinite(value) and abs(value) >= getattr(value, "exact_below", _EXACT_BELOW):
            raise ValueError(
                f"{name} is the float {value!r}, which may have lost digits: write the column as "
                "integers or as text"
            )
        return int(value) if value.is_integer() else None
    return value


def _advice(value: Any, name: str) -> str:
    """Return advice for a value that is not a number, "" without any."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+,[0-9]+", value):
        return "; write a decimal point"
    return _NO_SETTING.format(name) if isinstance(value, (str, dict, list)) else ""


def _shown(value: Any) -> str:
    """Return a value for a message: numbers and short strings in full, other values by type."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return json_type(value)
    return f"the string {shorten(str(value))}" if type(value) in (str, CellText) else shorten(value)


def to_json_values(value: Any, left_out: Callable[[str], None], path: str = "") -> Any:
    """Convert the values of a dataset to values that JSON can represent.

    NaN becomes null. Dates and times become text, and decimals their digits. A value without a JSON
    form (bytes, infinity, a decoded image) is left out of its object, and is null in its array.

    Args:
        value: A value of a row.
        left_out: Called with the path of each value that is left out.
        path: The path of `value`.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, dict):
        items = (
            (str(key), to_json_values(item, left_out, f"{path}.{key}" if path else str(key)))
            for key, item in value.items()
        )
        return {key: item for key, item in items if item is not MISSING}
    if isinstance(value, (list, tuple)):
        items_of = (to_json_values(item, left_out, path) for item in value)
        return [None if item is MISSING else item for item in items_of]
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return NumberText(format(value, "f"))
    if isinstance(value, float) and (math.isfinite(value) or math.isnan(value)):
        return value if math.isfinite(value) else None
    if (
        isinstance(value, uuid.UUID)
        or hasattr(value, "isoformat")
        or type(value).__name__ in ("timedelta", "Timedelta")
    ):
        return str(value)
    left_out(path)
    return MISSING
