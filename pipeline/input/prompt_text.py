"""Builds the prompt of a row from its fields: by a template, or from the messages of a chat.

Messages of errors contain names of fields, and no values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gptbatch.pipeline.config.prompt_template import TemplatePart
from gptbatch.pipeline.input.csv_file import CellText
from gptbatch.pipeline.input.fields import (
    find_field,
    has_cells,
    hint_for_type,
    missing_field,
    name_fields,
    take_field,
)
from gptbatch.pipeline.input.strict_json import (
    DECODER,
    NumberText,
    check_utf8,
    json_type,
    shorten,
    to_json,
)
from gptbatch.pipeline.input.values import MISSING, is_null, to_json_values

CONTENT = "content"


def render_template(parts: Sequence[TemplatePart], fields: dict[str, Any]) -> str:
    """Return the text of a template with the values of a row.

    A value is never parsed as a template. Strings are inserted as they are, numbers as the input
    has them, and booleans as `true` and `false`. Dates of a table have the text of the column
    metadata.

    Args:
        parts: As `parse_template` returns them.
        fields: The fields of the row.

    Raises:
        ValueError: A field is missing, or is null, an array, an object, or without a text.
    """
    texts = []
    for literal, path in parts:
        texts.append(literal)
        if path is not None:
            texts.append(_text_of(find_field(fields, path), fields, path))
    text = "".join(texts)
    check_utf8(text)
    return text


def _text_of(value: Any, fields: dict[str, Any], path: str) -> str:
    if value is MISSING:
        raise missing_field(fields, path, "prompt_template")
    if isinstance(value, str):
        return str(value)
    if value is None and has_cells(fields):
        # Most programs write an empty text as an empty cell of a CSV file.
        return ""
    if not is_null(value) and not isinstance(value, dict | list | tuple):
        converted = to_json_values(value, lambda _: None)
        if converted is not MISSING:
            return str(converted) if isinstance(converted, str) else to_json(converted)
    kind = "null" if is_null(value) else json_type(value)
    found = "infinity" if isinstance(value, float) and not is_null(value) else kind
    raise ValueError(
        f"{path}, which prompt_template names, must be a string, a number, true or false, not "
        f"{found}{hint_for_type(value, path, 'prompt_template')}"
    )


def take_messages(fields: dict[str, Any], path: str, left_out: Callable[[str], None]) -> str:
    """Remove the messages of a row and return them as JSON text.

    Args:
        fields: The row. It is modified.
        path: The field that holds them. Its value is an array of strings, or of objects with a
            string `content`.
        left_out: Called with the path of each value that has no JSON form.

    Raises:
        ValueError: There is no such field, or it does not hold messages.
    """
    value = take_field(fields, path)
    if value is MISSING:
        raise missing_field(fields, path, "messages_field")
    if isinstance(value, CellText) or has_cells(fields):
        raise ValueError(
            f"{path} must be an array of messages, which a cell of a CSV file cannot hold; write "
            "the rows as JSON lines or Parquet"
        )
    value = to_json_values(value, left_out, path)
    message_contents(value, path)
    return to_json(value)


def message_contents(messages: Any, path: str) -> list[str]:
    """Return the text of each message.

    Args:
        messages: An array of strings, or of objects with a string `content`.
        path: The field that holds them, for errors.

    Raises:
        ValueError: It is another value, or the array is empty.
    """
    if not isinstance(messages, list):
        raise ValueError(
            f"{path} must be an array of messages, not {json_type(messages)}; a message is a "
            f"string or an object with {CONTENT}"
        )
    if not messages:
        raise ValueError(f"{path} must hold at least one message")
    return [_content(message, f"{path}.{index}") for index, message in enumerate(messages)]


def parse_messages(text: str) -> list[str]:
    """Return the text of each message of a recorded prompt, which is the JSON of the messages.

    Raises:
        ValueError: It is not.
    """
    try:
        return message_contents(DECODER.decode(text), "prompt")
    except RecursionError:
        raise ValueError("prompt is nested too deep") from None


def _content(message: Any, path: str) -> str:
    content = message
    if isinstance(message, dict):
        if CONTENT not in message:
            raise ValueError(
                f"there is no field {shorten(f'{path}.{CONTENT}')}; the message has "
                f"{name_fields(message) or 'none'}"
            )
        content, path = message[CONTENT], f"{path}.{CONTENT}"
    if not isinstance(content, str) or isinstance(content, NumberText):
        needed = (
            "a string" if isinstance(message, dict) else f"a string or an object with {CONTENT}"
        )
        raise ValueError(f"{path} must be {needed}, not {json_type(content)}")
    return content
