"""Reads rows to score: the fields `continuation` or `choices` beside the prompt.

The reader is that of `generate`. The continuations pass through it as a field of the metadata, so
that the digest of the input covers them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.csv_file import CellText
from gptbatch.pipeline.input.fields import find_field, name_fields
from gptbatch.pipeline.input.open_input import open_input
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader
from gptbatch.pipeline.input.rows import BadRow
from gptbatch.pipeline.input.source import START, Place, RawRow, RowSource
from gptbatch.pipeline.input.strict_json import (
    NumberText,
    check_utf8,
    json_type,
    parse_value,
    shorten,
)
from gptbatch.pipeline.input.values import MISSING
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.types import Prompt

# A field of the metadata of a row. A row's own field of this name is not used.
_KEY = "gptbatch continuations"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFields:
    """The fields of a row that hold its continuations. A row has one of them.

    Attributes:
        continuation: A key or a dotted path of a text.
        choices: A key or a dotted path of a list of texts.
    """

    continuation: str = "continuation"
    choices: str = "choices"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One valid row.

    Attributes:
        prompt: Its prompt, id and index.
        continuations: At least one text.
    """

    prompt: Prompt
    continuations: list[str]


class ScoreReader:
    """The rows of an input.

    Args:
        config: Names the input, and the fields of the prompt and of the id.
        fields: The fields of the continuations.
    """

    def __init__(self, config: JobConfig, fields: ScoreFields) -> None:
        reader = open_input(config, purpose="scored")
        self._reader: PromptReader = replace(
            reader,
            source=_ContinuationSource(reader.source, fields),
            # A row's sampling settings have no meaning here. They are metadata.
            defaults=replace(reader.defaults, row_settings=()),
            record_bad=False,
        )

    def files(self) -> Sequence[Location] | None:
        """Return the files of the input; None where they are not known."""
        return self._reader.source.files()

    def check(self) -> InputSummary:
        """Read and validate all rows.

        Raises:
            InputRowsError: Rows are bad. Lists the first 20 reasons.
        """
        return self._reader.check()

    def rows(self, checked: InputSummary) -> Iterator[ScoreRow]:
        """Yield the rows of a checked input in order.

        Raises:
            InputRowsError: The input has changed.
        """
        for row in self._reader.prompts(checked):
            assert not isinstance(row, BadRow), "check has rejected them"
            assert row.metadata is not None
            yield ScoreRow(prompt=row, continuations=json.loads(row.metadata)[_KEY])


class _ContinuationSource:
    """The rows of a source, with their continuations in one field."""

    def __init__(self, source: RowSource, fields: ScoreFields) -> None:
        self._source, self._fields = source, fields
        self.name: str = source.name

    def rows(self, start: Place = START) -> Iterator[RawRow]:
        for raw in self._source.rows(start):
            yield replace(raw, parse=partial(self._parse, raw))

    def files(self) -> Sequence[Location] | None:
        return self._source.files()

    def _parse(self, raw: RawRow) -> dict[str, Any]:
        fields = raw.parse()
        fields[_KEY] = _find_continuations(fields, self._fields)
        return fields


def _find_continuations(fields: dict[str, Any], names: ScoreFields) -> list[str]:
    """Return the continuations of a row. Their field stays, since a template may name it.

    Raises:
        ValueError: The row has none, or both fields, or a value that is no text.
    """
    known = name_fields(fields) or "no other"
    one, several = find_field(fields, names.continuation), find_field(fields, names.choices)
    # columns of a table that this row does not use
    one = MISSING if one is None else one
    several = MISSING if several is None else several
    if one is MISSING and several is MISSING:
        raise ValueError(
            f"there is neither a field {shorten(names.continuation)} nor "
            f"{shorten(names.choices)}; the row has {known} "
            "(--continuation-field and --choices-field name others)"
        )
    if one is not MISSING and several is not MISSING:
        raise ValueError(
            f"there are both {shorten(names.continuation)} and {shorten(names.choices)}; "
            "a row has one of them"
        )
    if one is not MISSING:
        return [_text(one, names.continuation)]
    if isinstance(several, CellText):
        several = _array_in_cell(several, names.choices)
    if not isinstance(several, list):
        raise ValueError(f"{names.choices} must be an array of strings, not {json_type(several)}")
    if not several:
        raise ValueError(f"{names.choices} must hold at least one string")
    return [_text(value, f"{names.choices}.{i}") for i, value in enumerate(several)]


def _array_in_cell(cell: CellText, name: str) -> Any:
    """Return the array that a CSV cell holds as JSON."""
    try:
        return parse_value(cell)
    except ValueError as error:
        raise ValueError(f"{name} must hold an array of strings as JSON ({error})") from error


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or isinstance(value, NumberText):
        raise ValueError(f"{name} must be a string, not {json_type(value)}")
    check_utf8(value)
    return str(value)
