"""Reads rows from memory: texts, dictionaries, or a table of pandas, polars, pyarrow or DuckDB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import ConfigError, InputRowsError
from gptbatch.pipeline.input.arrow_file import BATCH_ROWS, row_reader
from gptbatch.pipeline.input.source import START, Place, RawRow
from gptbatch.pipeline.input.strict_json import json_type, shorten

# One prompt, an iterable of prompts, or a table with a row per prompt.
Prompts: TypeAlias = str | Mapping[str, Any] | Iterable[Any]
NAME = "prompts"


class PromptList:
    """Prompts in a list, in order.

    Args:
        prompts: Texts, dictionaries, and lists of messages where `messages_field` is set.
        config: Says in which field a text or a list of messages belongs.
    """

    name = NAME

    def __init__(self, prompts: Iterable[Any], config: JobConfig) -> None:
        self._prompts = list(prompts)
        self._text_field = (
            None if config.prompt_template or config.messages_field else config.prompt_field
        )
        self._messages_field = config.messages_field

    def rows(self, start: Place = START) -> Iterator[RawRow]:
        """Yield one row per prompt."""
        for position in range(start.position, len(self._prompts)):
            yield _raw_row(position, partial(self._fields, self._prompts[position]))

    def files(self) -> None:
        """Return None: there are no files."""

    def _fields(self, prompt: Any) -> dict[str, Any]:
        """Return the fields of a row. Raises ValueError for a value that is no prompt."""
        if isinstance(prompt, Mapping):
            fields = _plain(prompt)
            assert isinstance(fields, dict)
            return fields
        if isinstance(prompt, str):
            if self._text_field is None:
                raise ValueError(
                    "a text; with prompt_template or messages_field, a prompt is a dictionary of "
                    "fields"
                )
            return {self._text_field: prompt}
        if self._messages_field is not None and isinstance(prompt, (list, tuple)):
            return {self._messages_field: _plain(prompt)}
        raise ValueError(
            f"must be a text or a dictionary of fields, not {json_type(_plain(prompt))}"
        )


class PromptTable:
    """The rows of a table, with the types of its columns.

    Args:
        table: A pyarrow.Table.
    """

    name = NAME

    def __init__(self, table: Any) -> None:
        self._table = table

    def rows(self, start: Place = START) -> Iterator[RawRow]:
        """Yield the rows.

        Raises:
            InputRowsError: Two columns have one name.
        """
        position = start.position
        for batch in self._table.slice(position).to_batches(max_chunksize=BATCH_ROWS):
            read = row_reader(batch, self.name)
            for offset in range(batch.num_rows):
                yield _raw_row(position + offset, partial(read, offset))
            position += batch.num_rows

    def files(self) -> None:
        """Return None: there are no files."""


def prompt_source(prompts: Prompts, config: JobConfig) -> PromptList | PromptTable:
    """Return the rows of the prompts that a caller gave.

    Args:
        prompts: One prompt, an iterable of prompts, or a table with a row per prompt.
        config: Says which field holds the prompt.

    Raises:
        ConfigError: It is neither, or a set.
    """
    if isinstance(prompts, (str, Mapping)):
        return PromptList([prompts], config)
    # A column of a table is iterated; a table would yield its columns.
    if hasattr(prompts, "columns"):
        return PromptTable(_arrow_table(prompts))
    if isinstance(prompts, (set, frozenset)):
        raise ConfigError(
            "prompts must have an order, which ids and seeds follow; a set has none: give "
            "sorted(prompts)"
        )
    # An array of pyarrow would yield scalars.
    if hasattr(prompts, "to_pylist"):
        prompts = prompts.to_pylist()
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Iterable):
        raise ConfigError(
            "prompts must be a text, a dictionary, an iterable of these, or a table, not "
            f"{shorten(type(prompts).__name__)}"
        )
    return PromptList(prompts, config)


def _arrow_table(prompts: Any) -> Any:
    import pyarrow as pa

    if isinstance(prompts, pa.Table):
        return prompts
    try:
        return pa.table(prompts)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputRowsError(
            f"{NAME}: the table cannot be read ({error}); give a list of dictionaries, such as "
            "frame.to_dict('records')"
        ) from error


def _raw_row(position: int, parse: partial[dict[str, Any]]) -> RawRow:
    return RawRow(where=f"{NAME}[{position}]", position=position, parse=parse)


def _plain(value: Any) -> Any:
    """Return a copy with the types of JSON: keys are texts, arrays of numpy and torch are lists.

    Raises:
        ValueError: Two keys are one text.
    """
    if isinstance(value, Mapping):
        fields = {str(key): _plain(item) for key, item in value.items()}
        if len(fields) != len(value):
            raise ValueError("two keys are the same text")
        return fields
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # numbers and arrays
    return value.tolist() if hasattr(value, "tolist") else value
