"""A run that has been written, finished or not: its settings and its rows, for reading only.

Knows: the files of an output folder. Does not know: what made the rows, or what is right. Imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.data.completions import SCHEMA
from pipeline.data.output_folder import MANIFEST, FolderState, OutputFolder, facts_of
from pipeline.data.parts import read_footer
from pipeline.errors import InputNotFoundError, OutputConflictError, StorageError

BATCH_ROWS = 2048


class RecordedRun:
    """The run in an output folder. What it holds is looked up once: parts that appear later are not seen.

    manifest: what the folder says of the run, its identity among it. facts: what the run says of itself, model and profile among it.
    profiles: how the parts were made, each way once: a run that went on elsewhere has more than one. parts: the files of the table, in
    order. n_rows: rows in them. complete: whether the run has ended and all of its parts are there.

    Raises InputNotFoundError when there is no folder or no run of ours in it, StorageError when it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = _state(path)
            self.manifest = state.manifest
            self.parts, footers = _parts(state)
        except OSError as error:
            raise StorageError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
        promised = {part["name"]: part["content_digest"] for part in self.manifest.get("parts", [])}
        there = {part.name: footer.get("content_digest") for part, footer in zip(self.parts, footers, strict=True)}
        self.complete = state.marked_complete and all(there.get(name) == digest for name, digest in promised.items())
        self.facts = facts_of(self.manifest)
        self.profiles: list[dict[str, Any]] = []
        for footer in footers:
            if (profile := {**footer.get("profile", {}), "numerics": footer.get("numerics")}) not in self.profiles:
                self.profiles.append(profile)
        counts = [_count(part) for part in self.parts]
        self.n_rows = sum(counts)
        self._first_places = list(accumulate(counts[:-1], initial=0))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config that the run was started with. Raises StorageError when it is missing or damaged."""
        path = OutputFolder(self.path).work / "config.yaml"
        try:
            content = yaml.safe_load(path.read_bytes())
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
        except yaml.YAMLError as error:
            raise StorageError(f"{path}: is no YAML; the run's config is lost") from error
        if not isinstance(content, dict):
            raise StorageError(f"{path}: holds {type(content).__name__}, not a mapping; the run's config is lost")
        return content

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
                # a part may be of any size: its bytes are read as they are needed, not row group by row group
                with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 16) as file:
                    present = set(file.schema_arrow.names)
                    for batch in file.iter_batches(BATCH_ROWS, columns=[name for name in names if name in present]):
                        arrays = [batch[name] if name in present else pa.nulls(len(batch), SCHEMA.field(name).type) for name in names]
                        yield pa.RecordBatch.from_arrays(arrays, names=names)
            except (OSError, pa.ArrowException) as error:
                raise StorageError(f"{path}: cannot be read ({error}); the part is damaged or gone") from error

    def _part_at(self, place: int) -> tuple[int, int]:
        """The part that holds a place, and the place of its first row."""
        number = bisect_right(self._first_places, place) - 1
        return number, self._first_places[number]


class RowReader:
    """Rows of a run by their places: 0 is the first row of the first part.

    It goes on from where it is when it can, so that places that rise from call to call cost one pass over the table.
    """

    def __init__(self, run: RecordedRun, names: list[str]) -> None:
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
            yield from batch.take(pa.array([place - self._first for place in places[done:stop]], pa.int64())).to_pylist()
            done = stop

    def _seek(self, place: int) -> pa.RecordBatch:
        part, first_of_part = self._run._part_at(place)
        if self._batch is None or place < self._first or first_of_part > self._end:
            self._batches = self._run._batches(self._names, first_part=part)
            self._first = self._end = first_of_part
        while self._batch is None or place >= self._end:
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise StorageError(f"{self._run.path}: holds fewer rows than a moment ago; is a run writing to it?")
            self._first, self._end = self._end, self._end + len(self._batch)
        return self._batch


def _state(path: Path) -> FolderState:
    if not path.exists():
        raise InputNotFoundError(f"{path}: no such folder; name the output folder of a run")
    if not path.is_dir():
        raise InputNotFoundError(f"{path}: is no folder; name the output folder of a run")
    try:
        state = OutputFolder(path).state()
    except OutputConflictError as error:
        what = f"{MANIFEST} is damaged, or not ours" if (path / MANIFEST).is_file() else f"no {MANIFEST}"
        raise InputNotFoundError(f"{path}: holds no run of gptbatch ({what}); name the output folder of a run") from error
    if state is None:
        raise InputNotFoundError(f"{path}: holds no run of gptbatch (it is empty); name the output folder of a run")
    return state


def _parts(state: FolderState) -> tuple[list[Path], list[dict[str, Any]]]:
    """The parts in order, and their footers. A file without one is damaged where the manifest promises a part, else a stranger's."""
    promised = {part["name"] for part in state.manifest.get("parts", [])}
    parts: list[Path] = []
    footers: list[dict[str, Any]] = []
    for path in state.parts.values():
        footer = read_footer(path)
        if footer is not None:
            parts.append(path)
            footers.append(footer)
        elif path.name in promised:
            raise StorageError(f"{path}: cannot be read (no footer of gptbatch); the part is damaged")
    return parts, footers


def _count(path: Path) -> int:
    try:
        rows: int = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{path}: cannot be read ({error}); the part is damaged or gone") from error
    return rows


def _names(columns: Sequence[str] | None) -> list[str]:
    names = SCHEMA.names if columns is None else list(columns)
    unknown = [name for name in names if name not in SCHEMA.names]
    if unknown:
        raise ValueError(f"columns: the table has no {', '.join(map(repr, unknown))}; its columns are {', '.join(SCHEMA.names)}")
    return list(names)
