"""Strict JSON: no repeated keys, no NaN, bounded nesting, and numbers as they are written."""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_NESTING = 100
_MAX_SHOWN_CHARACTERS = 40


class NumberText(str):
    """A JSON number as it is written, so that it is neither rounded nor converted."""


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        ValueError: It is not valid JSON, or not an object. The message does not quote the text.
    """
    return require_object(parse_value(text.decode("utf-8") if isinstance(text, bytes) else text))


def parse_value(text: str) -> Any:
    """Parse one JSON value. Raises ValueError for other text; the message does not quote it."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels") from None


def require_object(value: Any) -> dict[str, Any]:
    """Return a parsed value that is an object. Raises ValueError for other types."""
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, not {json_type(value)}")
    return value


def to_json(value: Any, depth: int = 0) -> str:
    """Return the JSON text of a parsed value, with numbers as they were written.

    Raises:
        ValueError: JSON or UTF-8 cannot represent the value.
    """
    if depth > MAX_NESTING:
        raise ValueError(f"nested deeper than {MAX_NESTING} levels")
    if isinstance(value, NumberText):
        return value
    if isinstance(value, dict):
        items = (f"{to_json(key)}: {to_json(item, depth + 1)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(to_json(item, depth + 1) for item in value) + "]"
    if isinstance(value, str):
        check_utf8(value)
    return _ENCODER.encode(value)


def check_utf8(text: str) -> None:
    r"""Raise ValueError for a lone surrogate.

    JSON can express one by an escape such as \ud800. UTF-8 cannot encode it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate (U+{ord(text[error.start]):04X}) is not text") from None


def json_type(value: Any) -> str:
    """Return the JSON type of a parsed value, for messages that must not show the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (NumberText, int, float)):
        return "a number"
    names: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
    return next(
        (name for kind, name in names.items() if isinstance(value, kind)),
        f"a value of type {type(value).__name__}",
    )


def shorten(value: Any) -> str:
    """Return a value for a message: at most 40 characters, printable."""
    text = repr(value) if type(value) is str else str(value)
    if len(text) <= _MAX_SHOWN_CHARACTERS:
        return text
    return text[:_MAX_SHOWN_CHARACTERS] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shorten(key)} stands twice in one object")
            seen.add(key)
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"not valid JSON: {name} is no JSON number")


# json.dumps makes an encoder per call
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
DECODER = json.JSONDecoder(
    parse_float=NumberText,
    parse_int=NumberText,
    parse_constant=_no_constant,
    object_pairs_hook=_object,
)
