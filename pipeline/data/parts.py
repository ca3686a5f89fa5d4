"""Parts: the files of a table. Part k holds the input rows [kR, (k+1)R) in input order.

A part under its final name is the record that its rows are done; it becomes visible only whole and checked (durable.py), and its
footer says which rows it holds, what made them, and the digest of what is in it.

Knows: rows and files. Does not know: where rows come from.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.completions import content_digest, to_row, to_table
from pipeline.data.digests import DigestMemory, file_sha256
from pipeline.data.durable import Writer
from pipeline.errors import StorageError
from pipeline.records import Completion

FOOTER_KEY = b"gptbatch"
PART_NAME = re.compile(r"part-(\d{5,})\.parquet")
DEFAULT_PART_ROWS = 512  # about a minute of gpt2 on a CPU: what a kill can cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that has been written: which rows it holds and how they ended. Its footer says so, and so does the manifest.

    error_kinds: how many error rows of each kind. input_rows_digest: SHA-256 of what the input says in these rows. prompt_tokens and
    completion_tokens: sums over the rows.
    """

    name: str
    first_row: int
    rows: int
    error_kinds: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    input_rows_digest: str
    content_digest: str

    @property
    def errors(self) -> int:
        return sum(self.error_kinds.values())

    @property
    def number(self) -> int:
        return part_number(self.name)

    @classmethod
    def from_footer(cls, name: str, footer: dict[str, Any]) -> Part | None:
        """None when the footer does not say all that a part's must."""
        try:
            part = cls(name=name, **{field.name: footer[field.name] for field in fields(cls) if field.name != "name"})
            part.first_row + part.rows + part.errors + part.prompt_tokens + part.completion_tokens  # all are numbers
        except (KeyError, TypeError, AttributeError):
            return None
        return part


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def part_number(name: str) -> int:
    """The number in a part's name."""
    match = PART_NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


class PartWriter:
    """Collects rows in any order and commits each part when its last row arrives.

    memory: learns the digest of each part's file. total_rows: how many rows the input has. facts: what each footer says of the run.
    input_digests: of each part, by number.
    """

    def __init__(
        self,
        output: Path,
        writer: Writer,
        memory: DigestMemory,
        *,
        part_rows: int,
        total_rows: int,
        facts: dict[str, Any],
        input_digests: list[str],
    ) -> None:
        self._memory = memory
        self._output, self._writer, self.facts, self._input_digests = output, writer, facts, input_digests
        self._part_rows, self._total_rows = part_rows, total_rows
        self._waiting: dict[int, dict[int, dict[str, Any]]] = {}
        self._error_kinds: dict[int, Counter[str]] = {}

    @property
    def open_parts(self) -> list[int]:
        """The numbers of the parts that have some of their rows, in order."""
        return sorted(self._waiting)

    def add(self, completion: Completion, text: str | None) -> Part | None:
        """Take one row; `text` is its decoded new tokens, None for an error. The part that it completes, else None.

        Raises StorageError when that part cannot be written.
        """
        index = completion.prompt.index
        number = index // self._part_rows
        rows = self._waiting.setdefault(number, {})
        assert index not in rows
        rows[index] = to_row(completion, text)
        if completion.error is not None:
            self._error_kinds.setdefault(number, Counter())[completion.error.kind] += 1
        if len(rows) < rows_of_part(number, self._part_rows, self._total_rows):
            return None
        part = self._commit(number, [rows[index] for index in sorted(rows)])
        del self._waiting[number]
        return part

    def add_empty(self) -> Part:
        """The part of a run without rows, so that readers find the schema."""
        assert self._total_rows == 0
        return self._commit(0, [])

    def _commit(self, number: int, rows: list[dict[str, Any]]) -> Part:
        table = to_table(rows)
        part = Part(
            name=part_name(number),
            first_row=number * self._part_rows,
            rows=len(rows),
            error_kinds=dict(sorted(self._error_kinds.pop(number, Counter()).items())),
            prompt_tokens=sum(row["prompt_tokens"] for row in rows),
            completion_tokens=sum(row["completion_tokens"] for row in rows),
            input_rows_digest=self._input_digests[number],
            content_digest=content_digest(table),
        )
        footer = {**self.facts, **{key: value for key, value in asdict(part).items() if key != "name"}}
        table = table.replace_schema_metadata({FOOTER_KEY: json.dumps(footer)})

        def content(file: BinaryIO) -> None:
            with pq.ParquetWriter(file, table.schema, compression="zstd", write_page_checksum=True) as writer:
                if rows:  # load_dataset stumbles over a row group of no rows, not over no row group
                    writer.write_table(table)

        def check(path: Path) -> None:
            found = inspect_part(path, name=part.name)
            if found.state != "sound" or found.part != part:
                raise StorageError(f"{self._output / part.name}: what was written reads back otherwise; is the disk failing?")
            written.append(file_sha256(path))

        written: list[str] = []
        self._writer.write(self._output / part.name, content, check=check)
        self._memory.remember_part(part.name, written[0])
        return part


def rows_of_part(number: int, part_rows: int, total_rows: int) -> int:
    """How many rows of the input part `number` holds."""
    return max(0, min(part_rows, total_rows - number * part_rows))


def count_parts(part_rows: int, total_rows: int) -> int:
    """How many parts an input makes; one of no rows where there are none."""
    return max(1, -(-total_rows // part_rows))


# -- what is there ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPart:
    """A file under a part's name.

    state: "sound", ours and whole by its digest; "damaged", ours or unreadable, and not what a run of ours wrote; "foreign", a Parquet
    file that is not ours. footer and part: what it says of itself, None where it says nothing (whole).
    """

    path: Path
    state: Literal["sound", "damaged", "foreign"]
    footer: dict[str, Any] | None = None
    part: Part | None = None


def inspect_part(path: Path, *, name: str | None = None, content: bool = True) -> FoundPart:
    """Look at a file under a part's name. name: the name that it is to have, when it is not yet there.

    content: read all of it and compare digests; without, its footer is believed.
    """
    name = path.name if name is None else name
    if path.is_symlink() or not path.is_file():
        return FoundPart(path=path, state="foreign")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            if FOOTER_KEY not in metadata:
                return FoundPart(path=path, state="foreign")
            footer = json.loads(metadata[FOOTER_KEY])
            part = Part.from_footer(name, footer) if isinstance(footer, dict) else None
            if part is None or file.metadata.num_rows != part.rows:
                return FoundPart(path=path, state="damaged", footer=footer if isinstance(footer, dict) else None)
            if content and content_digest(file.read()) != part.content_digest:
                return FoundPart(path=path, state="damaged", footer=footer, part=part)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError):
        return FoundPart(path=path, state="damaged", footer=read_footer(path))
    return FoundPart(path=path, state="sound", footer=footer, part=part)


def read_footer(path: Path) -> dict[str, Any] | None:
    """What a part's footer says of its run; None when the file is no part of ours."""
    try:
        metadata = pq.read_schema(path).metadata or {}
        footer = json.loads(metadata[FOOTER_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return footer if isinstance(footer, dict) else None
