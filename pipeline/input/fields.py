"""Takes the fields of a row by key or dotted path, with messages for fields that are missing.

Messages contain the name of the field, and no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gptbatch.pipeline.input.strict_json import NumberText, check_utf8, json_type, shorten
from gptbatch.pipeline.input.values import MISSING, is_null, parse_setting
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS

_COLUMNS = "columns, not rows: pandas writes rows with orient='records', lines=True"
_MAX_NAMED_FIELDS = 12


def take_field(fields: dict[str, Any], path: str) -> Any:
    """Remove a field and return its value, MISSING where there is none.

    Args:
        fields: The row. It is modified; the values in it are not.
        path: A key, or the path of a nested value: `prompt.text`, `turns.0`. A key that contains
            dots takes precedence. Elements of arrays are not removed.
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
    """Return the value at a path, and the container without it."""
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
    """Yield each nested object on a dotted path, with the path to it and a final dot."""
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
    """Return the keys of a row for a message."""
    names = [shorten(name) for name in fields]
    shown = ", ".join(names[:_MAX_NAMED_FIELDS])
    return (
        shown
        if len(names) <= _MAX_NAMED_FIELDS
        else f"{shown} and {len(names) - _MAX_NAMED_FIELDS} more"
    )


def take_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove the sampling settings of a row and return those that it has, by name.

    Raises:
        ValueError: A value has another type or is out of range.
    """
    own: dict[str, Any] = {}
    for name, setting in SAMPLING_SETTINGS.items():
        if name in fields and not is_null(value := fields.pop(name)):
            own[name] = parse_setting(value, name, setting)
    return own


def take_prompt(fields: dict[str, Any], path: str) -> str:
    """Remove the prompt and return it.

    Raises:
        ValueError: There is no such field, or it is not a string.
    """
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
            return (
                " (requests of OpenAI's batch API: --prompt-field body.prompt --id-field custom_id;"
                " the settings inside are not followed)"
            )
        return (
            " (chat requests of OpenAI's batch API: write the messages out as one prompt, in the "
            "model's template)"
        )
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
        return (
            " (a map of rows, not one row: "
            "jq -c 'to_entries[] | {id: .key} + .value' FILE > rows.jsonl)"
        )
    return " (--prompt-field names the one to use)"
