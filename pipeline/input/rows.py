"""Validates one row of an input: a RawRow becomes a Prompt, or a BadRow with the reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gptbatch.pipeline.config.prompt_template import TemplatePart, template_fields
from gptbatch.pipeline.input.fields import (
    name_fields,
    objects_on_path,
    take_field,
    take_prompt,
    take_settings,
)
from gptbatch.pipeline.input.prompt_text import render_template, take_messages
from gptbatch.pipeline.input.row_warnings import FieldCounts, RowWarnings
from gptbatch.pipeline.input.source import RawRow
from gptbatch.pipeline.input.strict_json import MAX_NESTING, shorten, to_json
from gptbatch.pipeline.input.values import (
    MISSING,
    is_null,
    parse_id,
    parse_setting,
    to_json_values,
)
from gptbatch.pipeline.params.sampling_params import SamplingParams, to_json_value
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.types import Prompt

# The field of a line of errors.jsonl that says why the row is one. It is no metadata: the corrected
# row has no error.
REASON_FIELD = "gptbatch_error"
# json.dumps makes an encoder per call
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that is not a valid prompt.

    Attributes:
        index: Index in the input, from 0.
        where: The row in messages, `prompts.jsonl:3`.
        label: The row in the whole input: `line 3`, or `row 2`.
        reason: The error. It never quotes the prompt.
        text: The prompt, "" where it could not be read.
        metadata: The other fields as JSON text, settings among them; None where they could not be
            read.
        own_id: The id of the row; None where it could not be read, or is that of another row.
    """

    index: int
    where: str
    label: str
    reason: str
    text: str = ""
    metadata: str | None = None
    own_id: str | None = None

    @property
    def prompt_id(self) -> str:
        """The id of its error row: its own, else `line:3` or `row:2`."""
        return id_of_label(self.label) if self.own_id is None else self.own_id


@dataclass(frozen=True, kw_only=True)
class RowDefaults:
    """The fields that hold a row's prompt and id, and the settings of rows without their own.

    Attributes:
        prompt_field: A key or a dotted path. Not read with a template or messages.
        sampling: The settings of the run. Row seeds are derived from its seed.
        template: A parsed template that gives the prompt; None without one.
        messages_field: The field of the messages that are the prompt; None without it.
        id_field: A key or a dotted path. "" takes the index of the row as its id.
        row_settings: Names of the settings that a row may have. Fields with the names of other
            settings are metadata.
        given: Names of the settings of the run that are not left at their defaults.
    """

    prompt_field: str
    sampling: SamplingParams
    template: tuple[TemplatePart, ...] | None = None
    messages_field: str | None = None
    id_field: str = "id"
    row_settings: tuple[str, ...] = tuple(SAMPLING_SETTINGS)
    given: tuple[str, ...] = ()

    @property
    def prompt_paths(self) -> list[str]:
        """The fields that the prompt is made of."""
        if self.template is not None:
            return template_fields(list(self.template))
        return [self.messages_field or self.prompt_field]

    def params(self, prompt_id: str, own: Mapping[str, Any]) -> SamplingParams:
        """Return the parameters of a row: its own settings, and the run's for the others."""
        settings = {**self.run_settings, **own}
        if "seed" not in own:
            settings["seed"] = derive_seed(self.sampling.seed, prompt_id)
        return SamplingParams(**settings)

    @cached_property
    def run_settings(self) -> dict[str, Any]:
        """The settings of rows without their own, by name."""
        return self.sampling.as_dict()


def id_of_label(label: str) -> str:
    """Return the id of an error row without its own: `line:3` for `line 3`."""
    return label.replace(" ", ":")


def derive_seed(run_seed: int, prompt_id: str) -> int:
    """Return the seed of a row without one: 63 bits of SHA-256 of the run seed and the id."""
    message = b"gptbatch row seed\0" + run_seed.to_bytes(8, "little") + prompt_id.encode("utf-8")
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "little") >> 1


def sample_seed(row_seed: int, sample_index: int) -> int:
    """Return the seed of a sample: that of the row for the first one, then 63 bits of SHA-256."""
    if sample_index == 0:
        return row_seed
    numbers = row_seed.to_bytes(8, "little") + sample_index.to_bytes(4, "little")
    digest = hashlib.sha256(b"gptbatch sample seed\0" + numbers).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class RowParser:
    """Parses and validates rows.

    Args:
        defaults: Field names, and the settings of rows without their own.
        warnings: Counts fields that look like settings, and values without a JSON form.
        field_counts: Counts the fields that are settings and metadata; None counts none.
    """

    def __init__(
        self,
        defaults: RowDefaults,
        warnings: RowWarnings,
        field_counts: FieldCounts | None = None,
    ) -> None:
        self.defaults, self.warnings, self.field_counts = defaults, warnings, field_counts
        # of the row that is being parsed, for its error row
        self._text = ""
        self._fields: dict[str, Any] | None = None
        self._nested_paths = [path for path in defaults.prompt_paths if "." in path]
        self._no_settings = [
            name for name in SAMPLING_SETTINGS if name not in defaults.row_settings
        ]

    def parse(self, index: int, raw: RawRow) -> tuple[Prompt | BadRow, bytes]:
        """Return the row and the bytes that it adds to the input digest.

        The digest covers the content of the row. It does not cover the defaults of the run.
        """
        self._text, self._fields = "", None
        try:
            return self._parse(index, raw)
        except RecursionError:
            reason = f"nested deeper than {MAX_NESTING} levels"
        except ValueError as error:
            reason = str(error)
        own_id = self._own_id(raw)
        as_read = _json_if_possible(self._fields)
        row = BadRow(
            index=index,
            where=raw.where,
            label=raw.label,
            reason=reason,
            text=self._text,
            metadata=_json_if_possible(self._fields_of_bad_row(own_id)),
            own_id=own_id,
        )
        return row, _digest_input([row.prompt_id, reason, row.text, as_read])

    def _parse(self, index: int, raw: RawRow) -> tuple[Prompt, bytes]:
        """Parse a row. Errors name the field and, prompts aside, the value."""
        fields = raw.parse()
        fields.pop(REASON_FIELD, None)
        self._fields = dict(fields)
        defaults = self.defaults
        # a container may be on several paths
        containers = {
            prefix: container
            for path in self._nested_paths
            for prefix, container in objects_on_path(fields, path)
        }
        text = self._text = self._take_prompt(fields)
        self._fields = dict(fields)
        prompt_id = parse_id(self._take_id(fields), raw.position)
        kept = {name: fields.pop(name) for name in self._no_settings if name in fields}
        if self.field_counts is not None:
            self.field_counts.add_settings(fields)
        own = take_settings(fields)
        if own:
            self.warnings.count_own(own, defaults.run_settings)
        if defaults.row_settings:
            self.warnings.count_settings(fields)
            for prefix, container in containers.items():
                self.warnings.count_settings(container, prefix)
        fields |= kept
        if self.field_counts is not None:
            self.field_counts.add_metadata(fields)
        metadata = to_json(to_json_values(fields, self.warnings.count_left_out)) if fields else None
        prompt = Prompt(
            index=index,
            prompt_id=prompt_id,
            text=text,
            params=defaults.params(prompt_id, own),
            metadata=metadata,
        )
        if own and (problem := prompt.params.problem()):
            raise ValueError(problem)
        return prompt, _digest_input([prompt_id, text, own, metadata])

    def _take_prompt(self, fields: dict[str, Any]) -> str:
        """Return the prompt. The fields of a template stay: they are metadata too."""
        defaults = self.defaults
        if defaults.template is not None:
            return render_template(defaults.template, fields)
        if defaults.messages_field is not None:
            return take_messages(fields, defaults.messages_field, self.warnings.count_left_out)
        return take_prompt(fields, defaults.prompt_field)

    def _fields_of_bad_row(self, own_id: str | None) -> dict[str, Any] | None:
        """Return the fields of a bad row as a line of JSON must have them, None where unreadable.

        In CSV and tables, "5" and 5.0 are whole numbers; in JSON lines they are not. Values that
        cannot be read stay, to be corrected. Null stands for the run's setting. The id is left out
        where it can be read, and a nested prompt that cannot is a field of its own.
        """
        if self._fields is None:
            return None
        fields, defaults = dict(self._fields), self.defaults
        if own_id is not None and defaults.id_field:
            take_field(fields, defaults.id_field)
        if defaults.template is None:
            path = defaults.messages_field or defaults.prompt_field
            if (value := take_field(fields, path)) is not MISSING:
                fields[path] = value
        for name in self.defaults.row_settings:
            if name in fields and is_null(fields[name]):
                del fields[name]
            elif name in fields:
                setting = SAMPLING_SETTINGS[name]
                with suppress(ValueError):
                    fields[name] = to_json_value(
                        parse_setting(fields[name], name, setting), setting
                    )
        return fields

    def _own_id(self, raw: RawRow) -> str | None:
        """Return the id of a bad row, None where it cannot be read."""
        if self._fields is None:
            return None
        try:
            return parse_id(self._take_id(dict(self._fields)), raw.position)
        except ValueError:
            return None

    def _take_id(self, fields: dict[str, Any]) -> Any:
        id_field = self.defaults.id_field
        if not id_field:
            return None
        value = take_field(fields, id_field)
        if value is MISSING and id_field != "id":
            raise ValueError(
                f"there is no field {shorten(id_field)}, which id_field names; "
                f"the row has {name_fields(fields) or 'no other'}"
            )
        return None if value is MISSING else value


def _json_if_possible(fields: dict[str, Any] | None) -> str | None:
    """Return the JSON of fields; None for none, and where there is no JSON of them."""
    try:
        return to_json(to_json_values(fields, lambda path: None)) if fields else None
    except (ValueError, RecursionError):
        return None


def _digest_input(values: list[Any]) -> bytes:
    return _ENCODER.encode(values).encode("utf-8") + b"\n"
