"""The error rows of an output: the file `errors.jsonl`, and a sentence that counts them.

A line of errors.jsonl holds a row's id, prompt, settings and other fields, and `gptbatch_error`,
the reason. The file can be the input of another run, once its rows are corrected: a run leaves the
reasons out. A line that could not be parsed has no prompt, and is refused until it has one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from gptbatch.pipeline.errors import StorageError
from gptbatch.pipeline.input.rows import REASON_FIELD, RowDefaults
from gptbatch.pipeline.input.strict_json import parse_object, to_json
from gptbatch.pipeline.output.folder import ERRORS, OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_file import (
    GENERATE_AGAIN,
    is_damage,
    open_parquet,
    read_error,
)
from gptbatch.pipeline.params.sampling_params import from_row, to_json_value
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.storage.atomic_write import Writer
from gptbatch.pipeline.system.error_text import first_line

_COLUMNS = [
    "prompt_id",
    "sample_index",
    "prompt",
    *(name for name, setting in SAMPLING_SETTINGS.items() if setting.column_type),
    "sampling_params",
    "metadata",
    "error",
]
_ADVICE = {
    "too_long": "context_overflow: truncate_left keeps the end of such prompts",
    "empty_prompt": "give them a prompt",
    "unknown_token": "the model lacks a token of the tokenizer",
    "unencodable": (
        "the tokenizer has no tokens for parts of their text; on_lost_text: warn runs those that "
        "only lose characters"
    ),
    "invalid_setting": "the model or its tokenizer cannot follow one of their settings",
    "no_token_allowed": "their settings forbid every token at some step",
    "not_finite": "dtype: float32 has the widest range",
    "skipped": "named by skip_row",
}


def describe_errors(kinds: Mapping[str, int], rows: int) -> str:
    """Return a sentence that counts error rows by kind, with advice; "" without error rows.

    Args:
        kinds: Number of error rows of each kind (`types.ErrorKind`).
        rows: Rows of the whole input.
    """
    count = sum(kinds.values())
    if count == 0:
        return ""
    described = [
        f"{number} {kind}" + (f" ({_ADVICE[kind]})" if kind in _ADVICE else "")
        for kind, number in sorted(kinds.items())
        if number
    ]
    noun = "row is an error" if count == rows == 1 else "rows are errors"
    return f"{count} of {rows} {noun}: {', '.join(described)}"


def write_error_rows(
    folder: OutputFolder, writer: Writer, parts: Iterable[Part], defaults: RowDefaults
) -> None:
    """Write errors.jsonl; remove it when no row is an error.

    Args:
        folder: The output folder.
        writer: Writes files atomically.
        parts: Its written parts.
        defaults: The fields of the input. A dotted path becomes one key.

    Raises:
        StorageError: A part cannot be read, or the file cannot be written.
    """
    with_errors = sorted((part for part in parts if part.errors), key=lambda part: part.first_row)
    path = folder.work / ERRORS
    if not with_errors:
        writer.remove(path)
        return

    def write_lines(file: BinaryIO) -> None:
        for part in with_errors:
            for row in _error_rows(folder, part):
                file.write(_to_line(row, defaults).encode("utf-8") + b"\n")

    writer.write(path, write_lines)


def _error_rows(folder: OutputFolder, part: Part) -> Iterator[dict[str, Any]]:
    """Yield the first sample of each row with an error, with the error of the first that has one.

    Its seed is that of the row, so a line of it generates all samples again.
    """
    path = folder.path / part.name
    try:
        with open_parquet(path) as parquet:
            table = parquet.read(columns=_COLUMNS, use_threads=False)
    except Exception as error:
        if is_damage(error):
            raise StorageError(
                f"{path}: damaged ({first_line(error)}): {GENERATE_AGAIN}"
            ) from error
        raise read_error(path, error) from error
    failed = table.filter(pc.is_valid(table["error"]))
    first_samples = pc.subtract(
        pc.indices_nonzero(pc.is_valid(table["error"])).cast(pa.int64()),
        failed["sample_index"].cast(pa.int64()),
    )
    reasons: dict[int, str] = {}
    for index, reason in zip(first_samples.to_pylist(), failed["error"].to_pylist(), strict=True):
        reasons.setdefault(index, reason)
    for reason, row in zip(reasons.values(), table.take(list(reasons)).to_pylist(), strict=True):
        yield {**row, "error": reason}


def _to_line(row: dict[str, Any], defaults: RowDefaults) -> str:
    """Return a row as a JSON object. Numbers in the metadata keep their digits."""
    try:
        params = from_row(row)
    except ValueError as error:
        raise StorageError(
            f"row {row['prompt_id']!r} is damaged ({error}), and so is its part: {GENERATE_AGAIN}"
        ) from error
    columns: dict[str, Any] = {}
    if defaults.id_field:
        columns[defaults.id_field] = row["prompt_id"]
    if defaults.template is None and defaults.messages_field is None:
        columns[defaults.prompt_field] = row["prompt"] or None
    for name, value in params.as_dict().items():
        setting = SAMPLING_SETTINGS[name]
        is_default = value == setting.default == getattr(defaults.sampling, name)
        if name in defaults.row_settings and (setting.column_type or not is_default):
            columns[name] = to_json_value(value, setting)
    columns[REASON_FIELD] = row["error"]
    fields = {key: json.dumps(value, ensure_ascii=False) for key, value in columns.items()}
    if defaults.messages_field is not None:
        fields[defaults.messages_field] = row["prompt"] or "null"
    if row["metadata"] is not None:
        # The metadata of a bad row holds its own settings.
        fields |= {key: to_json(value) for key, value in parse_object(row["metadata"]).items()}
    pairs = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in fields.items())
    return "{" + ", ".join(pairs) + "}"
