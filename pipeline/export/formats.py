"""Writes exported rows: as JSON lines, Parquet or CSV."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

FACTS_KEY = b"gptbatch_export"
ROW_GROUP_BYTES = 64 << 20


def write_parquet(
    file: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch], facts: Mapping[str, Any]
) -> None:
    """Write one Parquet file, with facts of the run in the metadata of its schema."""
    schema = schema.with_metadata({FACTS_KEY: json.dumps(facts)})
    group: list[pa.RecordBatch] = []
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:

        def write_group() -> None:
            table = pa.Table.from_batches(group).cast(schema)
            writer.write_table(table, row_group_size=len(table))
            group.clear()

        for batch in batches:
            group.append(batch)
            if sum(batch.nbytes for batch in group) >= ROW_GROUP_BYTES:
                write_group()
        # load_dataset fails on a row group without rows
        if group:
            write_group()


def write_csv(
    file: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch], suffix: str
) -> None:
    """Write CSV (RFC 4180) with a header; compressed where the file's suffix is .gz or .zst.

    Null is an empty cell, and an empty text is "". Lists and structs are JSON text.
    """
    import pyarrow.csv

    def flat(field: pa.Field) -> pa.Field:
        return field.with_type(pa.string()) if pa.types.is_nested(field.type) else field

    def cells(column: pa.Array) -> pa.Array:
        if not pa.types.is_nested(column.type):
            return column
        texts = [None if value is None else to_json(value) for value in column.to_pylist()]
        return pa.array(texts, pa.string())

    flat_schema = pa.schema([flat(field) for field in schema])
    with (
        _compressed(file, suffix) as opened,
        pyarrow.csv.CSVWriter(pa.PythonFile(opened, "w"), flat_schema) as writer,
    ):
        for batch in batches:
            columns = [cells(column) for column in batch.columns]
            writer.write(pa.RecordBatch.from_arrays(columns, schema=flat_schema))


def write_lines(file: BinaryIO, objects: Iterable[Mapping[str, Any]], suffix: str) -> None:
    """Write one JSON object per line; compressed where the file's suffix is .gz or .zst."""
    with _compressed(file, suffix) as lines:
        for value in objects:
            lines.write(to_json(value).encode("utf-8") + b"\n")


def to_json(value: Mapping[str, Any] | list[Any]) -> str:
    """Return JSON: times as ISO 8601, and null for infinity, which JSON does not have."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_text_of_time)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, default=_text_of_time)


def rows_of(batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    """Yield the rows of batches."""
    for batch in batches:
        yield from batch.to_pylist()


@contextmanager
def _compressed(file: BinaryIO, suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".gz":
        # without a time or a name, equal rows are equal files
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as compressed:
            yield compressed  # type: ignore[misc]
    elif suffix == ".zst":
        import zstandard

        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as stream:
            yield stream
    else:
        yield file


def _text_of_time(value: Any) -> str:
    return str(value.isoformat())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
