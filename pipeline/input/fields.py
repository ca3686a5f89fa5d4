"""The fields of a row: exact types and ranges, dotted paths, and the words for a value that is wrong.

Messages name the field and, prompts aside, the value.
"""

from __future__ import annotations

import decimal
import math
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from gptbatch.pipeline.input.csv_file import CellText
from gptbatch.pipeline.input.strict_json import NumberText, check_utf8, json_type, shorten
from gptbatch.pipeline.types import SAMPLING_SETTINGS, SamplingSetting

MISSING = object()
_COLUMNS = "columns, not rows: pandas writes rows with orient='records', lines=True"
_MAX_NAMED_FIELDS = 12
_NUMBERS = (NumberText, CellText, int, float, decimal.Decimal)
_INTEGER = re.compile(r"-?[0-9]+")
_CELL_INTEGER = re.compile(r"(-?[0-9]+)(\.0+)?")
_CELL_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_EXACT_FLOAT = (
    2**53
)  # above it, not every whole number is a float; less for the floats of narrower columns


def take_field(fields: dict[str, Any], path: str) -> Any:
    """Remove a field and return its value, MISSING where there is none.

    Args:
        fields: a row; it is changed, the values in it are not.
        path: a key of the row, or the way to a value inside: `prompt.text`, `turns.0`. A key with a dot in its name comes first.
            An element of an array stays where it is.
    """
    if path in fields:
        return fields.pop(path)
    if "." not in path:
        return MISSING
    value, rest = _without(fields, path.split("."))
    if value is not MISSING:
        fields.clear()
        fields.update(rest)
    return value


def _without(container: Any, steps: list[str]) -> tuple[Any, Any]:
    """(the value at the end of the path, the container without it)."""
    step, *others = steps
    if isinstance(container, list):
        if not step.isdecimal() or int(step) >= len(container):
            return MISSING, container
        value = container[int(step)]
        return (_without(value, others)[0] if others else value), container
    if not isinstance(container, dict) or step not in container:
        return MISSING, container
    if not others:
        return container[step], {key: item for key, item in container.items() if key != step}
    value, rest = _without(container[step], others)
    if value is MISSING:
        return MISSING, container
    return value, {
        key: rest if key == step else item
        for key, item in container.items()
        if key != step or rest != {}
    }


def objects_on_path(fields: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path with a dot behind it, object) for each object inside a row that a dotted path leads through."""
    container: Any = fields
    prefix = ""
    for step in path.split(".")[:-1]:
        if isinstance(container, list) and step.isdecimal() and int(step) < len(container):
            container = container[int(step)]
        else:
            container = container.get(step) if isinstance(container, dict) else None
        prefix += f"{step}."
        if isinstance(container, dict):
            yield prefix, container


def name_fields(fields: dict[str, Any]) -> str:
    """The keys of a row, for a message."""
    names = [shorten(name) for name in fields]
    shown = ", ".join(names[:_MAX_NAMED_FIELDS])
    return (
        shown
        if len(names) <= _MAX_NAMED_FIELDS
        else f"{shown} and {len(names) - _MAX_NAMED_FIELDS} more"
    )


def _is_gap(value: Any) -> bool:
    """Whether a row has no value there: null, or the NaN that pandas has for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def parse_id(value: Any, place: int) -> str:
    if _is_gap(value):
        return str(place)
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
    raise ValueError(f"id must be a string or a whole number, not {_seen(value)}")


def take_settings(fields: dict[str, Any]) -> dict[str, int | float]:
    """Remove the sampling settings of a row and return those that it has, by name.

    Raises:
        ValueError: a value has another type or is out of range.
    """
    own: dict[str, int | float] = {}
    for name, setting in SAMPLING_SETTINGS.items():
        value = fields.pop(name, None)
        if not _is_gap(value):
            own[name] = _parse_setting(value, name, setting)
    return own


def _parse_setting(value: Any, name: str, setting: SamplingSetting) -> int | float:
    parse = _parse_integer if setting.type is int else _parse_number
    number = parse(value, name)
    if not setting.minimum <= number <= setting.maximum:
        shown = number if setting.type is int else value
        raise ValueError(
            f"{name} must be {setting.minimum} to {setting.maximum}, not {shorten(shown)}"
        )
    return number


def _parse_integer(value: Any, name: str) -> int:
    integer = (
        _whole(value, name) if isinstance(value, _NUMBERS) and not isinstance(value, bool) else None
    )
    if integer is None:
        raise ValueError(
            f"{name} must be a whole number, not {_seen(value)}{_not_a_setting(value, name)}"
        )
    return integer


def _parse_number(value: Any, name: str) -> float:
    is_number = isinstance(value, (NumberText, int, float)) or (
        isinstance(value, CellText) and _CELL_NUMBER.fullmatch(value)
    )
    if isinstance(value, bool) or not is_number:
        raise ValueError(
            f"{name} must be a number, not {_seen(value)}{_not_a_setting(value, name)}"
        )
    return float(value)


def _whole(value: NumberText | CellText | int | float | decimal.Decimal, name: str) -> int | None:
    """5 is whole; "5.0" is not in a JSON line, but a float of a table may be, since columns with gaps have no integers.

    Raises ValueError for a float that may stand for another number than was meant.
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
        if math.isfinite(value) and abs(value) >= getattr(value, "exact_below", _EXACT_FLOAT):
            raise ValueError(
                f"{name} is the float {value!r}, which may have lost digits: write the column as integers or as text"
            )
        return int(value) if value.is_integer() else None
    return value


def _not_a_setting(value: Any, name: str) -> str:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+,[0-9]+", value):
        return "; write a decimal point"
    return (
        f"; if this field is no setting, keep it with --metadata-field {name}"
        if isinstance(value, (str, dict, list))
        else ""
    )


def _seen(value: Any) -> str:
    """A value as a message may show it: numbers and short strings whole, all else by its type."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return json_type(value)
    return f"the string {shorten(str(value))}" if type(value) in (str, CellText) else shorten(value)


def to_json_values(value: Any, left_out: Callable[[str], None], path: str = "") -> Any:
    """The values of a dataset as JSON has them.

    NaN, a gap of pandas, is null. Dates, times and decimals are their text and their digits. A value without a JSON form
    (bytes, infinity, a decoded picture) is left out of its object, or null in its array.

    Args:
        left_out: told the path of each value that is left out.
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


def take_prompt(fields: dict[str, Any], path: str) -> str:
    """Remove the prompt and return it. Raises ValueError that says what there is instead."""
    text = take_field(fields, path)
    if text is MISSING:
        hint = _hint_for_missing(fields, path)
        raise ValueError(
            f"there is no field {shorten(path)}; the row has {name_fields(fields) or 'none'}{hint}"
        )
    if not isinstance(text, str) or isinstance(text, NumberText):
        raise ValueError(
            f"{path} must be a string, not {json_type(text)}{_hint_for_type(text, path)}"
        )
    check_utf8(text)
    return str(text)


def _hint_for_type(value: Any, path: str) -> str:
    if value is None:
        return '; in a CSV file, "" is an empty prompt and an empty cell is null'
    if isinstance(value, bytes):
        return "; cast the column to text"
    if not isinstance(value, dict):
        return ""
    inside = [key for key, item in value.items() if isinstance(item, str)]
    if inside and all(key.isdecimal() for key in value):
        return f" ({_COLUMNS})"
    return f" (--prompt-field {path}.{inside[0]} takes the text inside)" if inside else ""


def _hint_for_missing(fields: dict[str, Any], path: str) -> str:
    body = fields.get("body")
    if isinstance(body, dict) and "custom_id" in fields:
        if "prompt" in body:
            return " (requests of OpenAI's batch API: --prompt-field body.prompt --id-field custom_id; the settings inside are not followed)"
        return " (chat requests of OpenAI's batch API: write the messages out as one prompt, in the model's template)"
    inside = [
        key
        for key, value in fields.items()
        if isinstance(value, dict) and isinstance(value.get(path), str)
    ]
    if len(inside) == 1:
        return f" (--prompt-field {inside[0]}.{path} takes the text inside)"
    if same := [key for key in fields if key.lower().strip() == path.lower()]:
        return f" (--prompt-field '{same[0]}')"
    if items := [
        key
        for key, value in fields.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]:
        rows = f"jq -c '.{items[0]}[]' FILE makes a row of each item"
        return f" ({rows}; --prompt-field {items[0]}.0.NAME takes one text inside)"
    if inside and len(inside) == len(fields):
        return " (a map of rows, not one row: jq -c 'to_entries[] | {id: .key} + .value' FILE > rows.jsonl)"
    return " (--prompt-field names the one to use)"
