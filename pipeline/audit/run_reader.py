"""A run that has been written, finished or not: its settings and its rows, for reading only. Imports no torch."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from gptbatch.pipeline.errors import InputNotFoundError, OutputConflictError, StorageError
from gptbatch.pipeline.output.folder import CONFIG, OutputFolder
from gptbatch.pipeline.output.manifest import run_facts
from gptbatch.pipeline.output.old_formats import OLD_COLUMN_NAMES, is_old_format, translate_config
from gptbatch.pipeline.output.part_file import is_damage, open_parquet, read_error
from gptbatch.pipeline.output.part_listing import list_parts, read_run_state
from gptbatch.pipeline.output.schema import SCHEMA
from gptbatch.pipeline.system.regular_file import named_in_errors, open_regular
from gptbatch.pipeline.system.yaml_reader import MAX_RECORDED_BYTES, YamlError, parse_yaml_mapping

BATCH_ROWS = 2048


class RunReader:
    """The run in an output folder. What it holds is looked up once: parts that appear later are not seen.

    manifest: what the folder says of the run, its identity among it. facts: what the run says of itself, model and environment among it.
    environments: how the parts were made, each way once: a run that went on elsewhere has more than one. parts: the files of the table, in
    order. n_rows: rows in them. marked_complete: whether the run has ended. complete: whether it has, and all of its rows are there.
    rows_expected: rows of its input, None where an older version did not say. stray_tables: names of tables that are not its parts.

    Raises InputNotFoundError when there is no folder or no run of ours in it, OutputConflictError when it holds parts of several
    jobs, StorageError when it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = read_run_state(path)
            if state is None:
                raise InputNotFoundError(
                    f"{path}: holds no run of gptbatch (it is empty); name the output folder of a run"
                )
            found = list_parts(state)
        except OSError as error:
            raise StorageError(
                f"{error.filename or path}: cannot be read ({error.strerror or error})"
            ) from error
        self.manifest = state.manifest
        if found.other_jobs:
            raise OutputConflictError(
                f"{path}: {found.other_jobs}; they are no run together: move the parts of each job into a folder of their own"
            )
        promised = {part["name"]: part["content_digest"] for part in self.manifest.get("parts", [])}
        self.stray_tables = list(state.stray_tables)
        for part in found.unusable:
            # a file without a footer is damaged where the manifest promises a part, else a stranger's
            if part.footer is not None or part.path.name in promised:
                raise StorageError(
                    f"{part.path}: cannot be read ({part.problem}); the part is damaged"
                )
            self.stray_tables.append(part.path.name)
        self.parts = [self.path / part.name for part in found.parts]
        there = {part.name: part.content_digest for part in found.parts}
        self.marked_complete = state.marked_complete
        self.rows_expected: int | None = state.identity.get("rows")
        self.facts = run_facts(self.manifest)
        self.environments: list[dict[str, Any]] = []
        for footer in found.footers:
            if (
                environment := {
                    **footer.get("environment", {}),
                    "batch_invariance": footer.get("batch_invariance"),
                }
            ) not in self.environments:
                self.environments.append(environment)
        counts = [part.rows for part in found.parts]
        self.n_rows = sum(counts)
        self.complete = (
            state.marked_complete
            and self.rows_expected in (None, self.n_rows)
            and all(there.get(name) == digest for name, digest in promised.items())
        )
        self._first_places = list(accumulate(counts[:-1], initial=0))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config that the run was started with. Raises StorageError when it is missing or damaged."""
        path = OutputFolder(self.path).work / CONFIG
        try:
            with named_in_errors(path), open_regular(path) as file:
                content = file.read(MAX_RECORDED_BYTES + 1)
            if len(content) > MAX_RECORDED_BYTES:
                raise YamlError(f"larger than {MAX_RECORDED_BYTES >> 20} MiB")
            config = parse_yaml_mapping(content)
            return translate_config(config) if is_old_format(self.manifest["format"]) else config
        except (FileNotFoundError, NotADirectoryError) as error:
            if os.path.lexists(path.parent) and not path.parent.is_dir():
                raise StorageError(
                    f"{path.parent}: is not a folder; it should hold the settings of the run; copy it again"
                ) from error
            raise StorageError(
                f"{path}: missing: {self.path} is a copy without {path.parent.name}, which holds the settings of its run; "
                "copy the whole folder"
            ) from error
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
        except YamlError as error:
            raise StorageError(f"{path}: {error}; the settings of the run are lost") from error

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """All rows, part after part, a batch in memory at a time. Raises StorageError when a part cannot be read.

        columns: names of the schema; None takes all. A column that an older version did not write is None.
        """
        for batch in self._batches(_names(columns), first_part=0):
            yield from batch.to_pylist()

    def reader(self, columns: Sequence[str] | None = None) -> RowReader:
        """For rows at places; columns as in `rows`."""
        return RowReader(self, _names(columns))

    def find(self, prompt_id: str) -> dict[str, Any] | None:
        """The row of that id, all of its columns; None when there is none. Reads the ids up to it."""
        for place, row in enumerate(self.rows(["prompt_id"])):
            if row["prompt_id"] == prompt_id:
                return next(self.reader().take([place]))
        return None

    def _batches(self, names: list[str], *, first_part: int) -> Iterator[pa.RecordBatch]:
        for path in self.parts[first_part:]:
            try:
                with open_parquet(path) as file:
                    present = set(file.schema_arrow.names)
                    stored = {name: _stored_name(name, present) for name in names}
                    for batch in file.iter_batches(
                        BATCH_ROWS,
                        columns=[name for name in stored.values() if name is not None],
                        use_threads=False,
                    ):
                        arrays = [_column(batch, name, stored[name]) for name in names]
                        yield pa.RecordBatch.from_arrays(arrays, names=names)
            except Exception as error:
                if is_damage(error) or isinstance(error, FileNotFoundError):
                    raise StorageError(
                        f"{path}: cannot be read ({error}); the part is damaged or gone"
                    ) from error
                raise read_error(path, error) from error

    def _part_at(self, place: int) -> tuple[int, int]:
        """The part that holds a place, and the place of its first row."""
        number = bisect_right(self._first_places, place) - 1
        return number, self._first_places[number]


class RowReader:
    """Rows of a run by their places: 0 is the first row of the first part.

    It goes on from where it is when it can, so that places that rise from call to call cost one pass over the table.
    """

    def __init__(self, run: RunReader, names: list[str]) -> None:
        self._run, self._names = run, names
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._first = self._end = 0  # the places of _batch

    def take(self, places: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The rows at `places`, which rise and are 0 to n_rows - 1. Raises StorageError when a part cannot be read."""
        done = 0
        while done < len(places):
            batch = self._seek(places[done])
            stop = bisect_left(places, self._end, lo=done)
            yield from batch.take(
                pa.array([place - self._first for place in places[done:stop]], pa.int64())
            ).to_pylist()
            done = stop

    def _seek(self, place: int) -> pa.RecordBatch:
        part, first_of_part = self._run._part_at(place)
        if self._batch is None or place < self._first or first_of_part > self._end:
            self._batches = self._run._batches(self._names, first_part=part)
            self._first = self._end = first_of_part
        while self._batch is None or place >= self._end:
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise StorageError(
                    f"{self._run.path}: holds fewer rows than a moment ago; is a run writing to it?"
                )
            self._first, self._end = self._end, self._end + len(self._batch)
        return self._batch


def _stored_name(name: str, present: set[str]) -> str | None:
    """Return the name under which a file stores a column of the schema; None where an older version did not write it."""
    if name in present:
        return name
    old_name = OLD_COLUMN_NAMES.get(name)
    return old_name if old_name in present else None


def _column(batch: pa.RecordBatch, name: str, stored_name: str | None) -> pa.Array:
    """Return a column of the schema, in its type; nulls where the file does not store it.

    Raises:
        pa.ArrowException, ValueError: A value does not fit the type.
    """
    field = SCHEMA.field(name)
    if stored_name is None:
        return pa.nulls(len(batch), field.type)
    array = batch[stored_name]
    if array.type != field.type:
        array = array.cast(field.type)
    if not field.nullable and (
        array.null_count or (pa.types.is_list(field.type) and array.flatten().null_count)
    ):
        raise ValueError(f"{name} is null in a row")
    return array


def _names(columns: Sequence[str] | None) -> list[str]:
    names = SCHEMA.names if columns is None else list(columns)
    unknown = [name for name in names if name not in SCHEMA.names]
    if unknown:
        raise ValueError(
            f"columns: the table has no {', '.join(map(repr, unknown))}; its columns are {', '.join(SCHEMA.names)}"
        )
    return list(names)
