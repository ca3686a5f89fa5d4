"""Finds the fields of a row by key or dotted path, with messages for fields that are missing.

Messages contain the name of the field, and no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

from gptbatch.pipeline.input.csv_file import CellText
from gptbatch.pipeline.input.strict_json import NumberText, check_utf8, json_type, shorten
from gptbatch.pipeline.input.values import MISSING, is_null, parse_setting
from gptbatch.pipeline.params.misspelling import meant_names
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS

_COLUMNS = "columns, not rows: pandas writes rows with orient='records', lines=True"
_MAX_NAMED_FIELDS = 12
# fields among which a misspelt name is looked for
_MAX_COMPARED = 100
# Requests of OpenAI's batch API become rows: the body, with its id and its limit of tokens.
OPENAI_TO_ROWS = (
    "jq -c '.body + {id: .custom_id, max_new_tokens: (.body.max_completion_tokens // "
    ".body.max_tokens), logprobs: (if .body.logprobs == true then .body.top_logprobs // 0 else "
    ".body.logprobs // null end)} | del(.max_completion_tokens, .max_tokens, .top_logprobs)' "
    "FILE > rows.jsonl"
)

# The setting that names a field.
Naming = Literal["prompt_field", "prompt_template", "messages_field"]


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


def find_field(fields: dict[str, Any], path: str) -> Any:
    """Return the value of a field, MISSING where there is none. Paths are those of `take_field`."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for step in path.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return MISSING
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
        raise missing_field(fields, path, "prompt_field")
    if not isinstance(text, str) or isinstance(text, NumberText):
        raise ValueError(
            f"{path} must be a string, not {json_type(text)}"
            f"{_hint_for_null(fields) if text is None else ''}"
            f"{hint_for_type(text, path, 'prompt_field')}"
        )
    check_utf8(text)
    return str(text)


def missing_field(fields: dict[str, Any], path: str, naming: Naming) -> ValueError:
    """Return the error for a field that a row lacks. It names the row's fields."""
    which = "" if naming == "prompt_field" else f", which {naming} names"
    has = name_fields(fields) or "none"
    return ValueError(
        f"there is no field {shorten(path)}{which}; the row has {has}"
        f"{_hint_for_missing(fields, path, naming)}"
    )


def has_cells(fields: dict[str, Any]) -> bool:
    """Return whether a row is one of a CSV file; a row without any text has none."""
    return any(isinstance(value, CellText) for value in fields.values())


def _hint_for_null(fields: dict[str, Any]) -> str:
    return '; "" is an empty text and an empty cell is null' if has_cells(fields) else ""


def hint_for_type(value: Any, path: str, naming: Naming) -> str:
    """Return advice for a field that holds no text; "" without any."""
    if isinstance(value, bytes):
        return "; cast the column to text"
    if not isinstance(value, dict):
        return ""
    inside = [key for key, item in value.items() if isinstance(item, str)]
    if inside and all(key.isdecimal() for key in value):
        return f" ({_COLUMNS})"
    named = _named(f"{path}.{inside[0]}", naming) if inside else ""
    return f" ({named} takes the text inside)" if named else ""


def _named(path: str, naming: Naming) -> str:
    """Return how a setting names a field: `--prompt-field text`, or `{text}` in a template."""
    return f"{{{path}}}" if naming == "prompt_template" else f"--prompt-field {path}"


def _hint_for_missing(fields: dict[str, Any], path: str, naming: Naming) -> str:
    body = fields.get("body")
    if "custom_id" in fields and isinstance(body, dict) and body.keys() & {"prompt", "messages"}:
        then = "" if "prompt" in body else ", and --messages-field messages reads the chats"
        return f" (requests of OpenAI's batch API: {OPENAI_TO_ROWS} makes rows of them{then})"
    if naming == "messages_field":
        lists = [key for key, value in fields.items() if isinstance(value, list)]
        return f" (--messages-field {lists[0] if lists else 'FIELD'} takes the messages)"
    inside = [
        key
        for key, value in fields.items()
        if isinstance(value, dict) and isinstance(value.get(path), str)
    ]
    if len(inside) == 1:
        return f" ({_named(f'{inside[0]}.{path}', naming)} takes the text inside)"
    if same := [key for key in fields if key.lower().strip() == path.lower().strip()]:
        if naming == "prompt_template":
            return f" (write {{{same[0]}}})"
        return f" ({_named(repr(same[0]), naming)})"
    if chats := [key for key, value in fields.items() if _is_chat(value)]:
        return f" (--messages-field {chats[0]} takes the messages)"
    if items := [
        key
        for key, value in fields.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]:
        rows = f"jq -c '.{items[0]}[]' FILE makes a row of each item"
        return f" ({rows}; {_named(f'{items[0]}.0.NAME', naming)} takes one text inside)"
    if inside and len(inside) == len(fields):
        return (
            " (a map of rows, not one row: "
            "jq -c 'to_entries[] | {id: .key} + .value' FILE > rows.jsonl)"
        )
    if close := meant_names(path, islice(fields, _MAX_COMPARED)):
        if naming == "prompt_template":
            return f" (did you mean {{{close[0]}}}?)"
        return f" ({_named(close[0], naming)} takes {close[0]})"
    option = "prompt_template" if naming == "prompt_template" else "--prompt-field"
    return f" ({option} names the one to use)"


def _is_chat(value: Any) -> bool:
    """Return whether a value holds the messages of a chat."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and {"role", "content"} <= value[0].keys()
    )
