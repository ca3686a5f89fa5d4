"""RunReader: the settings and rows of a recorded run, finished or not. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa

from gptbatch.pipeline.errors import InputNotFoundError, OutputConflictError, StorageError
from gptbatch.pipeline.output.environment import environment_differences
from gptbatch.pipeline.output.folder import CONFIG, OutputFolder
from gptbatch.pipeline.output.manifest import facts_of
from gptbatch.pipeline.output.old_formats import has_column, translate_config
from gptbatch.pipeline.output.part_file import (
    GENERATE_AGAIN,
    is_damage,
    open_parquet,
    read_error,
)
from gptbatch.pipeline.output.part_listing import PartListing, list_parts, read_run_state
from gptbatch.pipeline.output.schema import SCHEMA
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import named_in_errors, open_whole
from gptbatch.pipeline.system.error_text import first_line
from gptbatch.pipeline.system.nouns import noun
from gptbatch.pipeline.system.yaml_reader import MAX_RECORDED_BYTES, YamlError, parse_yaml_mapping

BATCH_ROWS = 2048


class RunReader:
    """The run in an output folder.

    The folder is listed once: parts that are written later are not seen.

    Args:
        path: The output folder.

    Attributes:
        path: The output folder.
        manifest: The manifest, with the identity of the job.
        facts: The facts in the manifest: model, device, environment and others. Parts may have
            others.
        facts_of_parts: The different facts of parts, each with the numbers of its parts. A run on
            several machines has several.
        environments: The facts of each environment in which parts were computed. A run that was
            continued elsewhere has more than one, unless all of them are portable.
        parts: The part files, in order.
        n_rows: Rows of the table in them: one per sample.
        rows_done: Rows of the input in them.
        content_digest: SHA-256 of the content digests of the parts.
        marked_complete: Whether the run has ended.
        complete: Whether the run has ended and all of its rows are present.
        rows_expected: Rows of the input; None where an older version did not record it.
        stray_tables: Tables that are not parts of the run.
        state: The folder, as `output_status` takes it.
        listing: Its parts, without their footers.

    Raises:
        InputNotFoundError: There is no folder, or no run in it.
        OutputConflictError: The folder holds parts of several jobs.
        StorageError: The folder or a part cannot be read.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        try:
            state = read_run_state(path)
            if state is None:
                raise InputNotFoundError(
                    f"{path}: holds no run of gptbatch (it is empty); name the output folder of a "
                    "run"
                )
            listing = list_parts(state)
        except OSError as error:
            raise StorageError(
                f"{error.filename or path}: cannot be read ({error.strerror or error})"
            ) from error
        if listing.other_jobs:
            raise OutputConflictError(
                f"{path}: {listing.other_jobs}; they are no run together: move the parts of each "
                "job into a folder of their own"
            )
        self.manifest = state.manifest
        self.facts = facts_of(self.manifest)
        self.marked_complete = state.marked_complete
        self.rows_expected: int | None = state.identity.get("rows")
        recorded = {part["name"]: part["content_digest"] for part in self.manifest.get("parts", [])}
        self.stray_tables = state.stray_tables + _foreign_files(listing, recorded)
        self.state, self.listing = state, replace(listing, footers=[])
        self.parts = [self.path / part.name for part in listing.parts]
        self.facts_of_parts = _facts_of_parts(listing)
        self.environments = _environments(facts for facts, _ in self.facts_of_parts)
        counts = [part.samples for part in listing.parts]
        self.n_rows = sum(counts)
        self.rows_done = sum(part.rows for part in listing.parts)
        contents = "".join(part.content_digest for part in listing.parts)
        self.content_digest = hashlib.sha256(contents.encode()).hexdigest()
        present = {part.name: part.content_digest for part in listing.parts}
        self.complete = (
            state.marked_complete
            and self.rows_expected in (None, self.rows_done)
            and all(present.get(name) == digest for name, digest in recorded.items())
        )
        self._first_rows = list(accumulate(counts[:-1], initial=0))

    @property
    def described_rows(self) -> str:
        """The rows that it holds: `6 rows`, or `12 samples of 6 rows`."""
        return describe_rows(self.n_rows, self.rows_done, self.has_samples)

    @property
    def has_samples(self) -> bool:
        """Whether rows have several samples."""
        return self.n_rows != self.rows_done

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config of the run.

        Raises:
            StorageError: The file is missing or damaged.
        """
        path = OutputFolder(self.path).work / CONFIG
        try:
            with named_in_errors(path), open_whole(path) as file:
                content = file.read(MAX_RECORDED_BYTES + 1)
            if len(content) > MAX_RECORDED_BYTES:
                raise YamlError(f"larger than {MAX_RECORDED_BYTES >> 20} MiB")
            config = parse_yaml_mapping(content)
            return translate_config(config, self.manifest["format"])
        except (FileNotFoundError, NotADirectoryError) as error:
            if os.path.lexists(str(path.parent)) and not path.parent.is_dir():
                raise StorageError(
                    f"{path.parent}: is not a folder; it should hold the settings of the run; copy "
                    "it again"
                ) from error
            raise StorageError(
                f"{path}: missing: {self.path} is a copy without {path.parent.name}, which holds "
                "the settings of its run; "
                "copy the whole folder"
            ) from error
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
        except YamlError as error:
            raise StorageError(f"{path}: {error}; the settings of the run are lost") from error

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield all rows, part after part. Memory holds one batch of rows.

        Args:
            columns: Names of columns; None takes all. A column that an older version did not write
                is None.

        Raises:
            StorageError: A part cannot be read.
        """
        for batch in self.batches(columns):
            yield from batch.to_pylist()

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield all rows as batches of at most BATCH_ROWS; columns and errors as in `rows`."""
        return self._batches(_names(columns), first_part=0)

    def row_reader(self, columns: Sequence[str] | None = None) -> RowReader:
        """Return a reader of rows by index; columns as in `rows`."""
        return RowReader(self, _names(columns))

    def find(self, prompt_id: str, sample_index: int = 0) -> dict[str, Any] | None:
        """Return a sample of the row with an id, with all columns, or None. Reads ids up to it."""
        for index, row in enumerate(self.rows(["prompt_id", "sample_index"])):
            if (row["prompt_id"], row["sample_index"] or 0) == (prompt_id, sample_index):
                return next(self.row_reader().take([index]))
        return None

    def require(self, prompt_id: str, sample_index: int = 0) -> dict[str, Any]:
        """Return a sample of the row with an id, with all columns.

        Raises:
            InputNotFoundError: There is none.
        """
        row = self.find(prompt_id, sample_index)
        if row is None:
            size = (
                f"the run has {self.described_rows}"
                if self.complete
                else f"the run is not complete; it has {self.described_rows} so far"
            )
            sample = f" and sample_index {sample_index}" if sample_index else ""
            raise InputNotFoundError(
                f"{self.path}: no row has the id {prompt_id!r}{sample}; {size}"
            )
        return row

    def _batches(self, names: list[str], *, first_part: int) -> Iterator[pa.RecordBatch]:
        for path in self.parts[first_part:]:
            try:
                with open_parquet(path) as file:
                    present = set(file.schema_arrow.names)
                    stored = {name for name in names if name in present and self._has(name)}
                    for batch in file.iter_batches(
                        BATCH_ROWS, columns=sorted(stored), use_threads=False
                    ):
                        arrays = [_column(batch, name, name in stored) for name in names]
                        yield pa.RecordBatch.from_arrays(arrays, names=names)
            except Exception as error:
                if is_damage(error) or isinstance(error, FileNotFoundError):
                    raise StorageError(
                        f"{path}: cannot be read ({first_line(error)}); the part is damaged or "
                        f"gone: {GENERATE_AGAIN}"
                    ) from error
                raise read_error(path, error) from error

    def _has(self, column: str) -> bool:
        return has_column(self.manifest["format"], column)

    def _part_of(self, index: int) -> tuple[int, int]:
        """Return the number of the part that holds a row, and the index of the part's first row."""
        number = bisect_right(self._first_rows, index) - 1
        return number, self._first_rows[number]


class RowReader:
    """Reads rows of a run by index; 0 is the first row of the first part.

    Indices that increase from call to call cost one pass over the table.

    Args:
        run: The run.
        names: The columns.
    """

    def __init__(self, run: RunReader, names: list[str]) -> None:
        self._run, self._names = run, names
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        # _batch holds the rows from _first to _end - 1.
        self._first = self._end = 0

    def take(self, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield rows.

        Args:
            indices: Increasing indices from 0 to n_rows - 1.

        Raises:
            StorageError: A part cannot be read.
        """
        done = 0
        while done < len(indices):
            batch = self._seek(indices[done])
            stop = bisect_left(indices, self._end, lo=done)
            offsets = array("q", (index - self._first for index in indices[done:stop]))
            # pa.array would import pandas.
            places = pa.Array.from_buffers(pa.int64(), len(offsets), [None, pa.py_buffer(offsets)])
            yield from batch.take(places).to_pylist()
            done = stop

    def _seek(self, index: int) -> pa.RecordBatch:
        """Return the batch that holds a row."""
        part, first_of_part = self._run._part_of(index)
        if self._batch is None or index < self._first or first_of_part > self._end:
            self._batches = self._run._batches(self._names, first_part=part)
            self._first = self._end = first_of_part
        while self._batch is None or index >= self._end:
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise StorageError(
                    f"{self._run.path}: holds fewer rows than a moment ago; is a run writing to it?"
                )
            self._first, self._end = self._end, self._end + len(self._batch)
        return self._batch


def describe_rows(samples: int, rows: int, has_samples: bool) -> str:
    """Return counts in words: `6 rows`, or `12 samples of 6 rows` where rows have several."""
    counted = f"{rows} {noun(rows, 'row')}"
    return f"{samples} {noun(samples, 'sample')} of {counted}" if has_samples else counted


def _foreign_files(listing: PartListing, recorded: Mapping[str, str]) -> list[str]:
    """Return the files with parts' names that another program wrote.

    A file without a footer is a damaged part where the manifest lists its name, and foreign
    otherwise.

    Raises:
        StorageError: A part is damaged.
    """
    foreign = []
    for file in listing.unusable:
        if file.footer is not None or file.path.name in recorded:
            raise StorageError(
                f"{file.path}: cannot be read ({file.problem}); the part is damaged: "
                f"{GENERATE_AGAIN}"
            )
        foreign.append(file.path.name)
    return foreign


def _facts_of_parts(listing: PartListing) -> list[tuple[dict[str, Any], list[int]]]:
    """Return the different facts of parts, each with the numbers of its parts."""
    found: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for part, footer in zip(listing.parts, listing.footers, strict=True):
        facts = facts_of(footer)
        _, numbers = found.setdefault(json.dumps(facts, sort_keys=True), (facts, []))
        numbers.append(part.number)
    return list(found.values())


def _environments(recorded: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first facts of each environment."""
    environments: list[dict[str, Any]] = []
    for facts in recorded:
        if all(environment_differences(known, facts) for known in environments):
            environments.append(facts)
    return environments


def _column(batch: pa.RecordBatch, name: str, is_stored: bool) -> pa.Array:
    """Return a column of the schema, in its type; nulls where the file does not store it.

    Raises:
        pa.ArrowException, ValueError: A value does not fit the type.
    """
    field = SCHEMA.field(name)
    if not is_stored:
        return pa.nulls(len(batch), field.type)
    values = batch[name]
    if values.type != field.type:
        values = values.cast(field.type)
    if not field.nullable and (
        values.null_count or (pa.types.is_list(field.type) and values.flatten().null_count)
    ):
        raise ValueError(f"{name} is null in a row")
    return values


def _names(columns: Sequence[str] | None) -> list[str]:
    names = SCHEMA.names if columns is None else list(columns)
    unknown = [name for name in names if name not in SCHEMA.names]
    if unknown:
        raise ValueError(
            f"columns: the table has no {', '.join(map(repr, unknown))}; its columns are "
            f"{', '.join(SCHEMA.names)}"
        )
    return list(names)
