"""`errors.jsonl`: the error rows of an output as lines that a run can read again.

A line has the row's id, prompt, parameters and other fields, and `error`, the reason. Rows that could not be read have an empty
prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow.compute as pc

from gptbatch.pipeline.errors import StorageError
from gptbatch.pipeline.input.rows import RowDefaults
from gptbatch.pipeline.input.strict_json import parse_object, to_json
from gptbatch.pipeline.output.folder import ERRORS, OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.parts import is_damage, open_parquet, reading_error
from gptbatch.pipeline.types import SAMPLING_SETTINGS

_COLUMNS = [
    "prompt_id",
    "prompt",
    *SAMPLING_SETTINGS,
    "metadata",
    "error",
]


def write_error_rows(folder: OutputFolder, parts: Iterable[Part], defaults: RowDefaults) -> None:
    """Write the error rows of these parts; removes the file when there are none. Raises StorageError.

    Args:
        defaults: where the run finds prompt and id of a row; a dotted path becomes a key of that name.
    """
    with_errors = sorted((part for part in parts if part.errors), key=lambda part: part.first_row)
    path = folder.work / ERRORS
    if not with_errors:
        folder.writer.remove(path)
        return

    def content(file: BinaryIO) -> None:
        for part in with_errors:
            for line in _lines(folder, part, defaults):
                file.write(line.encode("utf-8") + b"\n")

    folder.writer.write(path, content)


def _lines(folder: OutputFolder, part: Part, defaults: RowDefaults) -> Iterator[str]:
    path = folder.path / part.name
    try:
        with open_parquet(path) as parquet:
            table = parquet.read(columns=_COLUMNS, use_threads=False)
    except Exception as error:
        if is_damage(error):
            raise StorageError(f"{path}: damaged ({error}); run the same command again") from error
        raise reading_error(path, error) from error
    for row in table.filter(pc.is_valid(table["error"])).to_pylist():
        own = {
            defaults.id_field: row["prompt_id"],
            defaults.prompt_field: row["prompt"],
            **{name: row[name] for name in SAMPLING_SETTINGS},
            "error": row["error"],
        }
        fields = {
            key: json.dumps(value, ensure_ascii=False)
            for key, value in own.items()
            if key not in defaults.metadata_fields
        }
        if row["metadata"] is not None:
            others = parse_object(row["metadata"])  # numbers as they are written
            fields |= {key: to_json(value) for key, value in others.items() if key not in fields}
        yield (
            "{"
            + ", ".join(
                f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in fields.items()
            )
            + "}"
        )
