"""Writes exported rows: as JSON lines, results of OpenAI's batch API, Parquet or CSV."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

FACTS_KEY = b"gptbatch_export"
ROW_GROUP_BYTES = 64 << 20
# what `openai_lines` reads
OPENAI_COLUMNS = (
    "prompt_id",
    "prompt_index",
    "sample_index",
    "completion",
    "finish_reason",
    "error",
    "prompt_tokens",
    "completion_tokens",
    "started_at",
)


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


def openai_lines(
    rows: Iterable[Mapping[str, Any]], *, model: str, is_chat: bool
) -> Iterator[dict[str, Any]]:
    """Yield the results of OpenAI's batch API: one per prompt, with a choice per sample.

    A prompt of which a sample has an error has that error. Without any completion, its response is
    null.

    Args:
        rows: The columns OPENAI_COLUMNS, samples of a prompt together.
        model: The name of the model.
        is_chat: Prompts are messages, so that the results are chat completions.
    """
    for index, group in groupby(rows, key=lambda row: row["prompt_index"]):
        samples = list(group)
        done = [sample for sample in samples if sample["error"] is None]
        failed = next((sample for sample in samples if sample["error"] is not None), None)
        yield {
            "id": f"batch_req_{index}",
            "custom_id": samples[0]["prompt_id"],
            "response": {
                "status_code": 200,
                "request_id": f"req_{index}",
                "body": _body(done, index, model, is_chat=is_chat),
            }
            if done
            else None,
            "error": failed and {"code": "row_error", "message": failed["error"]},
        }


def _body(
    samples: list[Mapping[str, Any]], index: int, model: str, *, is_chat: bool
) -> dict[str, Any]:
    started_at = samples[0]["started_at"]
    prompt_tokens = samples[0]["prompt_tokens"]
    completion_tokens = sum(sample["completion_tokens"] for sample in samples)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{index}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0 if started_at is None else int(started_at.timestamp()),
        "model": model,
        "choices": [_choice(sample, is_chat=is_chat) for sample in samples],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _choice(sample: Mapping[str, Any], *, is_chat: bool) -> dict[str, Any]:
    text = sample["completion"]
    return {
        "index": sample["sample_index"] or 0,
        **({"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}),
        "logprobs": None,
        "finish_reason": sample["finish_reason"],
    }


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
