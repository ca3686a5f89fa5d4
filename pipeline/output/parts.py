"""Parts: the Parquet files of a table. Part k holds the input rows [kR, (k+1)R) in input order.

A part under its final name is the record that its rows are done. It becomes visible whole and checked (durable.py), and only
where no other file has the name. Its footer says which rows it holds, what made them, and the digest of their content.
"""

from __future__ import annotations

import json
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from gptbatch.pipeline.errors import (
    GptbatchError,
    OutOfMemoryError,
    OutputConflictError,
    StorageError,
)
from gptbatch.pipeline.output.atomic_write import Writer
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.json_models import PART_NAME_PATTERN, Footer, Part, validated
from gptbatch.pipeline.output.old_formats import translate_facts
from gptbatch.pipeline.output.schema import SCHEMA_DIGEST, content_digest, to_row, to_table
from gptbatch.pipeline.system.regular_file import (
    file_sha256,
    named_in_errors,
    open_regular,
    parse_json,
)
from gptbatch.pipeline.types import Completion

# The version of the folder's layout, and a digest of the schema of its parts.
FORMAT = f"gptbatch-3-{SCHEMA_DIGEST}"
FOOTER_KEY = b"gptbatch"
PART_NAME = re.compile(PART_NAME_PATTERN)
MAX_COMMIT_TRIES = 3  # of a part whose name is taken and free again in between
# A larger limit changes these, and the job goes on.
_INPUT_KEYS = ("input_digest", "rows", "limit")


def part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"


def part_number(name: str) -> int | None:
    """The number in a part's name; None for other names."""
    match = PART_NAME.fullmatch(name)
    return int(match[1]) if match is not None and name == part_name(int(match[1])) else None


def rows_of_part(number: int, part_rows: int, total_rows: int) -> int:
    """How many rows of the input part `number` holds."""
    return max(0, min(part_rows, total_rows - number * part_rows))


def count_parts(part_rows: int, total_rows: int) -> int:
    """How many parts an input makes; one of no rows where there are none."""
    return max(1, -(-total_rows // part_rows))


# -- whose a part is ---------------------------------------------------------------------------------------------------


def differing_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The keys that make two identities (see `job_identity`) different jobs; empty for the same job.

    The input decides only where both have the same number of rows: a larger limit is the same job.
    """
    keys = [
        key for key, value in ours.items() if key not in _INPUT_KEYS and theirs.get(key) != value
    ]
    if ours.get("rows") == theirs.get("rows") and ours.get("input_digest") != theirs.get(
        "input_digest"
    ):
        keys.append("input_digest")
    return keys


@dataclass(frozen=True, slots=True, kw_only=True)
class PartPlan:
    """The parts that a job has.

    identity: of the job, its input included. input_digests: of the rows of each part, by number.
    """

    identity: dict[str, Any]
    input_digests: list[str]

    @property
    def part_rows(self) -> int:
        return int(self.identity["part_rows"])

    @property
    def total_rows(self) -> int:
        return int(self.identity["rows"])

    @property
    def n_parts(self) -> int:
        return count_parts(self.part_rows, self.total_rows)

    def rows_of(self, number: int) -> int:
        return rows_of_part(number, self.part_rows, self.total_rows)

    def is_whole(self, part: Part) -> bool:
        """Whether a part of this job holds all rows that its name says, and these as the input has them now."""
        number = part.number
        return number < self.n_parts and (part.first_row, part.rows, part.input_rows_digest) == (
            number * self.part_rows,
            self.rows_of(number),
            self.input_digests[number],
        )

    def check_ours(self, found: PartFile) -> None:
        """Raises OutputConflictError for a file that another job, or another program, has written."""
        if found.state == "foreign":
            raise OutputConflictError(
                f"{found.path}: is not a part that gptbatch wrote ({found.problem}); move it away, or name another output"
            )
        if found.footer is None:
            return
        if found.footer["format"] != FORMAT:
            raise OutputConflictError(
                f"{found.path}: has format {found.footer['format']}, and this version writes {FORMAT}; name another output"
            )
        # an identity's own number of rows says nothing of one part: its input is compared below
        keys = differing_keys({**self.identity, "rows": None}, found.footer["identity"])
        if keys:
            raise OutputConflictError(
                f"{found.path}: is a part of another job ({', '.join(keys)} differ); name another output"
            )
        part = found.part
        if part is None:
            return
        own_number, offset = divmod(part.first_row, self.part_rows)
        whole = offset == 0 and part.rows == self.rows_of(own_number) and own_number < self.n_parts
        if whole and part.input_rows_digest != self.input_digests[own_number]:
            raise OutputConflictError(
                f"{found.path}: is a part of another input (input_rows_digest differs); name another output"
            )


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFile:
    """A file under a part's name.

    state: "sound", ours and whole; "damaged", ours or unreadable, and not as a run wrote it; "foreign", no file of ours: another
    Parquet file, a link, folder, FIFO, socket or device; "missing". problem: what is wrong, "" for a sound one. footer and part:
    what it says of itself, None where it says nothing (whole).
    """

    path: Path
    state: Literal["sound", "damaged", "foreign", "missing"]
    problem: str = ""
    footer: dict[str, Any] | None = None
    part: Part | None = None


class _NoFooter(Exception):  # noqa: N818
    """A Parquet file that gptbatch did not write."""


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file, read as it is needed and without threads, its page checksums verified.

    It is opened here: pyarrow takes names with a colon for URLs. Raises as pyarrow does; see `is_damage`.
    """
    with (
        named_in_errors(path),
        open_regular(path) as file,
        pq.ParquetFile(
            file, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 16
        ) as parquet,
    ):
        yield parquet


def is_damage(error: Exception) -> bool:
    """Whether an error of reading is about the bytes of the file, and not about memory, threads, permissions or the disk.

    Arrow raises OSError without an errno for bytes that it cannot decode.
    """
    if isinstance(error, (MemoryError, pa.ArrowCancelled)):
        return False
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, (pa.ArrowException, ValueError, LookupError, TypeError))


def reading_error(path: Path, error: Exception) -> GptbatchError:
    """The error to raise for one that `is_damage` says is none."""
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"{path}: cannot be read: out of memory ({error})")
    cause = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else f"{type(error).__name__}: {error}"
    )
    return StorageError(f"{path}: cannot be read ({cause})")


def inspect_part(
    path: Path, *, name: str | None = None, content: bool = True, follow_links: bool = False
) -> PartFile:
    """Look at a file under a part's name.

    Args:
        path: The file.
        name: The name that it is to have, where it does not have it yet.
        content: Read all of it and compare digests; without, its footer is believed.
        follow_links: Take a link to a regular file for the file, as readers do; a run refuses links.

    Raises:
        StorageError: It cannot be read, for a reason other than its content.
        OutOfMemoryError: There is no memory to read it.
    """
    footer: dict[str, Any] | None = None
    part: Part | None = None
    try:
        mode = (path.stat() if follow_links else path.lstat()).st_mode
        if not stat.S_ISREG(mode):
            return PartFile(
                path=path,
                state="foreign",
                problem="a symbolic link" if stat.S_ISLNK(mode) else "not a regular file",
            )
        footer, rows = _read_footer(path)
        part = _to_part(path.name if name is None else name, footer)
        if rows != part.rows:
            raise ValueError(f"it holds {rows} rows, and its footer says {part.rows}")
        if content and footer["format"] == FORMAT:
            with open_parquet(path) as parquet:
                digest = content_digest(parquet.read(use_threads=False))
            if digest != part.content_digest:
                raise ValueError(
                    "its rows are not those that were written (content_digest differs)"
                )
    except FileNotFoundError:
        return PartFile(path=path, state="missing", problem="gone")
    except _NoFooter:
        return PartFile(path=path, state="foreign", problem="a Parquet file without its footer")
    except Exception as error:
        if not is_damage(error):
            raise reading_error(path, error) from error
        return PartFile(
            path=path,
            state="damaged",
            problem=str(error) or type(error).__name__,
            footer=footer,
            part=part,
        )
    return PartFile(path=path, state="sound", footer=footer, part=part)


def read_footer(path: Path) -> dict[str, Any] | None:
    """The footer of a part; None when the file is no part of ours. Raises as `inspect_part` does."""
    return inspect_part(path, content=False, follow_links=True).footer


def _read_footer(path: Path) -> tuple[dict[str, Any], int]:
    """The footer, valid, and the number of rows that Parquet says."""
    with named_in_errors(path), open_regular(path) as file:
        metadata = pq.read_metadata(file)
    text = (metadata.metadata or {}).get(FOOTER_KEY)
    if text is None:
        raise _NoFooter
    footer = translate_facts(parse_json(text))
    validated(Footer, {**footer, "name": part_name(0)} if isinstance(footer, dict) else footer)
    return footer, int(metadata.num_rows)


def _to_part(name: str, footer: dict[str, Any]) -> Part:
    return validated(Part, {**footer, "name": name})


# -- writing -----------------------------------------------------------------------------------------------------------


class PartWriter:
    """Collects rows in any order and commits each part when its last row arrives.

    Args:
        output: The output folder.
        writer: Writes its files.
        memory: Learns the digest of each part's file.
        plan: The parts of the job.
        facts: What each footer says of the run.
    """

    def __init__(
        self,
        output: Path,
        writer: Writer,
        memory: FileHashes,
        *,
        plan: PartPlan,
        facts: dict[str, Any],
    ) -> None:
        self._output, self._writer, self._memory, self._plan = output, writer, memory, plan
        self.facts = facts
        self._waiting: dict[int, dict[int, dict[str, Any]]] = {}
        self._error_kinds: dict[int, Counter[str]] = {}

    @property
    def open_parts(self) -> list[int]:
        """The numbers of the parts that have some of their rows, in order."""
        return sorted(self._waiting)

    def add(self, completion: Completion, text: str | None) -> Part | None:
        """Take one row; `text` is its decoded new tokens, None for an error. The part that it completes, else None.

        Raises StorageError when that part cannot be written, OutputConflictError when another job's has its name.
        """
        index = completion.prompt.index
        number = index // self._plan.part_rows
        rows = self._waiting.setdefault(number, {})
        assert index not in rows
        rows[index] = to_row(completion, text)
        if completion.error is not None:
            self._error_kinds.setdefault(number, Counter())[completion.error.kind] += 1
        if len(rows) < self._plan.rows_of(number):
            return None
        part = self._commit(number, [rows[index] for index in sorted(rows)])
        del self._waiting[number]
        return part

    def add_empty(self) -> Part:
        """The part of a run without rows, so that readers find the schema."""
        assert self._plan.total_rows == 0
        return self._commit(0, [])

    def _commit(self, number: int, rows: list[dict[str, Any]]) -> Part:
        """Write the part where its name is free; else keep the same part of another run of this job, or replace what is damaged."""
        table = to_table(rows)
        part = Part(
            name=part_name(number),
            first_row=number * self._plan.part_rows,
            rows=len(rows),
            error_kinds=dict(sorted(self._error_kinds.pop(number, Counter()).items())),
            prompt_tokens=sum(row["prompt_tokens"] for row in rows),
            completion_tokens=sum(row["completion_tokens"] for row in rows),
            input_rows_digest=self._plan.input_digests[number],
            content_digest=content_digest(table),
        )
        footer = {**self.facts, **part.model_dump(exclude={"name"})}
        table = table.replace_schema_metadata({FOOTER_KEY: json.dumps(footer)})
        path = self._output / part.name
        for _ in range(MAX_COMMIT_TRIES):
            if self._write(path, table, part, only_if_absent=True):
                return part
            found = inspect_part(path)
            if found.state == "missing":
                continue
            self._plan.check_ours(found)
            if (
                found.state == "sound"
                and found.part is not None
                and self._plan.is_whole(found.part)
            ):
                self._check_same_rows(found, part)
                self._memory.record_part(part.name, file_sha256(path))
                return found.part
            self._write(path, table, part, only_if_absent=False)
            return part
        raise StorageError(
            f"{path}: appears and disappears; is another program working in this folder?"
        )

    def _write(self, path: Path, table: pa.Table, part: Part, *, only_if_absent: bool) -> bool:
        def content(file: BinaryIO) -> None:
            with pq.ParquetWriter(
                file, table.schema, compression="zstd", write_page_checksum=True
            ) as writer:
                if len(
                    table
                ):  # load_dataset stumbles over a row group of no rows, not over no row group
                    writer.write_table(table)

        def check(temporary: Path) -> None:
            found = inspect_part(temporary, name=part.name)
            if found.state != "sound" or found.part != part:
                cause = found.problem or "its footer differs"
                raise StorageError(
                    f"{path}: what was written reads back otherwise ({cause}); is the disk failing?"
                )
            written.append(file_sha256(temporary))

        written: list[str] = []
        if not self._writer.write(path, content, check=check, only_if_absent=only_if_absent):
            return False
        self._memory.record_part(part.name, written[0])
        return True

    def _check_same_rows(self, found: PartFile, part: Part) -> None:
        assert found.part is not None
        assert found.footer is not None
        if found.part.content_digest != part.content_digest:
            same = found.footer.get("environment") == self.facts.get("environment")
            why = "on a machine with the same environment" if same else "with another environment"
            raise OutputConflictError(
                f"{found.path}: another run of this job wrote it {why}, and its rows differ (content_digest); name another output"
            )
