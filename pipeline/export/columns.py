"""ExportTable: the columns to export, those of a run and those made of its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.errors import ConfigError, InputNotFoundError, StorageError
from gptbatch.pipeline.export.field_type import MAX_KEYS, FieldType
from gptbatch.pipeline.input.fields import find_field, name_fields
from gptbatch.pipeline.input.strict_json import shorten
from gptbatch.pipeline.input.values import MISSING
from gptbatch.pipeline.output.part_file import GENERATE_AGAIN
from gptbatch.pipeline.output.schema import SCHEMA
from gptbatch.pipeline.params.misspelling import meant_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What to export.

    Attributes:
        columns: Columns of the table; None takes all, but `metadata` with `all_metadata`.
        metadata: Metadata fields, or dotted paths, to make columns of.
        metadata_json: The same, as columns of JSON text.
        all_metadata: Make a column of every metadata field.
    """

    columns: Sequence[str] | None = None
    metadata: Sequence[str] = ()
    metadata_json: Sequence[str] = ()
    all_metadata: bool = False


class ExportTable:
    """The rows of a run with the selected columns.

    Args:
        run: The run.
        selection: The columns.

    Raises:
        ConfigError: There is no such column, two have one name, or none is selected.
        InputNotFoundError: No row has one of the metadata fields.
        InputRowsError: A metadata field has values of several types.
        StorageError: A part cannot be read.
    """

    def __init__(self, run: RunReader, selection: Selection) -> None:
        self._run, self._selection = run, selection
        self._columns = _column_names(selection)
        self._types = self._metadata_types()
        self._json = list(dict.fromkeys(selection.metadata_json))
        added = [*self._types, *self._json]
        if not (self._columns or added):
            raise ConfigError(
                f"columns: none is selected; the table has {', '.join(SCHEMA.names)}",
                keys=("columns",),
            )
        for name in added:
            if name in self._columns or added.count(name) > 1:
                raise ConfigError(
                    f"metadata field {shorten(name)}: another column has this name; select the "
                    "others with --columns, or each field once"
                )

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the run, with their descriptions, and then those of the metadata.

        All may be null: outputs of older formats lack columns.
        """
        return pa.schema(
            [
                *(SCHEMA.field(name).with_nullable(True) for name in self._columns),
                *((name, field.to_arrow()) for name, field in self._types.items()),
                *((name, pa.string()) for name in self._json),
            ]
        )

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows in the order of the run. Memory holds one batch.

        Raises:
            StorageError: A part cannot be read.
        """
        schema = self.schema
        has_fields = bool(self._types or self._json)
        needed = ["prompt_id", "metadata"] if has_fields else []
        for batch in self._run.batches(list(dict.fromkeys([*self._columns, *needed]))):
            arrays = [batch[name] for name in self._columns]
            rows = [fields for _, fields in _metadata(batch)] if has_fields else []
            for name in self._types:
                values = [_value(fields, name) for fields in rows]
                arrays.append(pa.array(values, schema.field(name).type))
            for name in self._json:
                texts = [_json_text(find_field(fields, name)) for fields in rows]
                arrays.append(pa.array(texts, pa.string()))
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _metadata_types(self) -> dict[str, FieldType]:
        """Return the types of the metadata fields. Reads the metadata of all rows."""
        selection = self._selection
        types = {name: FieldType(name) for name in selection.metadata}
        as_json = dict.fromkeys(selection.metadata_json, False)
        keys: dict[str, None] = {}
        if not (types or as_json or selection.all_metadata):
            return {}
        for batch in self._run.batches(["prompt_id", "metadata"]):
            for row, fields in _metadata(batch):
                keys.update(dict.fromkeys(fields))
                if len(keys) > MAX_KEYS:
                    raise ConfigError(
                        f"the rows have more than {MAX_KEYS} different metadata fields; name those "
                        "to export with --metadata"
                    )
                if selection.all_metadata:
                    for name in fields.keys() - types.keys() - as_json.keys():
                        types[name] = FieldType(name)
                for name, field in types.items():
                    if (value := find_field(fields, name)) is not MISSING:
                        field.add(value, row)
                for name in as_json:
                    as_json[name] = as_json[name] or find_field(fields, name) is not MISSING
        found = {name: field.found for name, field in types.items()} | as_json
        if self._run.n_rows and (
            missing := [name for name, is_found in found.items() if not is_found]
        ):
            raise InputNotFoundError(
                f"no row has the metadata field {shorten(missing[0])}; there are "
                f"{name_fields(keys) or 'none'}"
            )
        order = [*selection.metadata, *keys]
        return {name: types[name] for name in dict.fromkeys(order) if name in types}


def _column_names(selection: Selection) -> list[str]:
    """Return the selected columns in the order of the selection."""
    if selection.columns is None:
        return [n for n in SCHEMA.names if n != "metadata" or not selection.all_metadata]
    if unknown := [name for name in selection.columns if name not in SCHEMA.names]:
        raise ConfigError(
            f"columns: the table has no {', '.join(shorten(n) + _hint(n) for n in unknown)}; its "
            f"columns are {', '.join(SCHEMA.names)}; --metadata makes columns of other fields of "
            "the rows",
            keys=("columns",),
        )
    return list(dict.fromkeys(selection.columns))


def _hint(name: str) -> str:
    """Return the columns that a name may stand for, in words; "" for none."""
    meant = ["prompt_id"] if name.lower() == "id" else meant_names(name, SCHEMA.names)
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def _metadata(batch: pa.RecordBatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the id and the metadata of each row. Samples of a row share an object."""
    text: str | None = None
    fields: dict[str, Any] = {}
    ids, texts = batch["prompt_id"].to_pylist(), batch["metadata"].to_pylist()
    for prompt_id, next_text in zip(ids, texts, strict=True):
        if next_text != text:
            text, fields = next_text, _parse(next_text, prompt_id)
        yield prompt_id, fields


def _parse(text: str | None, prompt_id: str) -> dict[str, Any]:
    try:
        fields = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise StorageError(
            f"row {shorten(prompt_id)}: its metadata is no JSON object; its part is damaged: "
            f"{GENERATE_AGAIN}"
        )
    return fields


def _value(fields: dict[str, Any], name: str) -> Any:
    value = find_field(fields, name)
    return None if value is MISSING else value


def _json_text(value: Any) -> str | None:
    return None if value is MISSING else json.dumps(value, ensure_ascii=False)
