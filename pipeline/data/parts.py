"""Parts: the files of a table. Part k holds the input rows [kR, (k+1)R) in input order.

A part becomes visible only whole: it is written under a temporary name, then renamed.
Knows: rows and files. Does not know: where rows come from.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.completions import content_digest, to_table
from pipeline.errors import StorageError

FOOTER_KEY = b"gptbatch"
PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that has been written: which rows it holds and how they ended."""

    name: str
    first_row: int
    rows: int
    errors: int
    content_digest: str


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


class PartWriter:
    """Collects rows in any order and writes each part when its last row arrives.

    total_rows: how many rows the input has. facts: what each footer says of the run.
    """

    def __init__(self, output: Path, work: Path, *, part_rows: int, total_rows: int, facts: dict[str, Any]) -> None:
        self._output, self._work, self._facts = output, work, facts
        self._part_rows, self._total_rows = part_rows, total_rows
        self._waiting: dict[int, dict[int, dict[str, Any]]] = {}
        self.parts: list[Part] = []

    def add(self, row: dict[str, Any]) -> None:
        """Take one row. Raises StorageError when its part is whole and cannot be written."""
        number = row["prompt_index"] // self._part_rows
        rows = self._waiting.setdefault(number, {})
        assert row["prompt_index"] not in rows
        rows[row["prompt_index"]] = row
        if len(rows) == min(self._part_rows, self._total_rows - number * self._part_rows):
            del self._waiting[number]
            self._write(number, [rows[index] for index in sorted(rows)])

    def close(self) -> None:
        """Call when all rows are in. A run without rows gets one part of none, so that readers find the schema."""
        assert not self._waiting, "every row must have been added"
        if self._total_rows == 0:
            self._write(0, [])

    def _write(self, number: int, rows: list[dict[str, Any]]) -> None:
        table = to_table(rows)
        part = Part(
            name=part_name(number),
            first_row=number * self._part_rows,
            rows=len(rows),
            errors=sum(row["finish_reason"] == "error" for row in rows),
            content_digest=content_digest(table),
        )
        footer = {**self._facts, "first_row": part.first_row, "rows": part.rows, "content_digest": part.content_digest}
        table = table.replace_schema_metadata({FOOTER_KEY: json.dumps(footer)})
        temporary = self._work / f"{part.name}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as file:
                with pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True) as writer:
                    if rows:  # load_dataset stumbles over a row group of no rows, not over no row group
                        writer.write_table(table)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._output / part.name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"{self._output / part.name}: cannot be written ({error.strerror or error})") from error
        self.parts.append(part)


def read_footer(path: Path) -> dict[str, Any] | None:
    """What a part's footer says of its run; None when the file is no part of ours."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        footer = json.loads(metadata[FOOTER_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return footer if isinstance(footer, dict) else None
