"""InputFiles: an input of one or several files, JSON lines or Parquet, read as one table."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from gptbatch.pipeline.errors import InputNotFoundError
from gptbatch.pipeline.input.arrow_file import ArrowFile
from gptbatch.pipeline.input.dataset_files import suffix_of, walk
from gptbatch.pipeline.input.file_kind import read_head
from gptbatch.pipeline.input.jsonl import JsonlFile
from gptbatch.pipeline.input.row_count import FileRows, RowCount
from gptbatch.pipeline.input.source import START, Place, RawRow
from gptbatch.pipeline.storage.location import Location, location_of
from gptbatch.pipeline.storage.object_path import match_objects

logger = logging.getLogger("gptbatch")

STANDARD_INPUT = "-"
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
MAX_FILES = 100_000


class InputFiles:
    """The rows of files, one after the other.

    With several files, a row's position counts the rows of the files before, too. Then a row has
    the same id, seed and part wherever the rows are divided into files.

    Args:
        names: Files, folders and glob patterns. A folder stands for its files of JSON lines and
            Parquet. `-` is standard input.

    Raises:
        InputNotFoundError: There is no such file, or one is given twice.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._files = [_open(path) for path in find_files(names)]
        first = self._files[0].name
        self.name = first if len(self._files) == 1 else f"{first} and {len(self._files) - 1} more"

    def rows(self, start: Place = START) -> Iterator[RawRow]:
        """Yield the rows of all files, from a place on."""
        if len(self._files) == 1:
            yield from self._files[0].rows(start)
            return
        position = start.position
        begin = start._replace(position=start.row)
        for index, file in islice(enumerate(self._files), start.file, None):
            for row in file.rows(begin):
                yield RawRow(
                    where=row.where,
                    position=position,
                    parse=row.parse,
                    unit=row.unit,
                    file=index,
                    offset=row.offset,
                )
                position += 1
            begin = START

    def count(self, limit: int | None = None) -> RowCount:
        """Count the rows without parsing them. Files behind the limit are not opened.

        Raises:
            InputRowsError: A file is damaged, or of another kind.
        """
        counted: list[FileRows] = []
        left = limit
        for file in self._files:
            if left is not None and left <= 0:
                break
            counted.append(file.count(left) if isinstance(file, JsonlFile) else file.count())
            left = None if left is None else left - counted[-1].rows
        return RowCount(counted, limit)

    def files(self) -> list[Location] | None:
        """Return the files; None for pipes and standard input."""
        paths: list[Location] = []
        for file in self._files:
            found = file.files() if isinstance(file, JsonlFile) else [file.path]
            if found is None:
                return None
            paths += found
        return paths


def find_files(names: Sequence[str]) -> list[str | Location]:
    """Return the files that names stand for, in order; those of a folder or pattern are sorted.

    Raises:
        InputNotFoundError: There is no such file, or one is given twice.
    """
    if STANDARD_INPUT in names and len(names) > 1:
        raise InputNotFoundError("-: standard input cannot be combined with other inputs")
    files: list[str | Location] = []
    for name in names:
        files += _expand(name)
    if len(files) > MAX_FILES:
        raise InputNotFoundError(
            f"{names[0]}: {len(files)} files, and at most {MAX_FILES} are read; join some of them"
        )
    seen: set[str] = set()
    for file in files if len(files) > 1 else ():
        real = os.path.realpath(file) if isinstance(file, (str, Path)) else str(file)
        if real in seen:
            raise InputNotFoundError(f"{file}: is given twice; its rows would have the same ids")
        seen.add(real)
    return files


def _expand(name: str) -> list[str | Location]:
    if name == STANDARD_INPUT:
        return [name]
    path = location_of(name)
    if path.is_dir():
        suffixes = (*JSONL_SUFFIXES, *PARQUET_SUFFIXES)
        entries = _files_below(path)
        found = [entry for entry in entries if suffix_of(entry) in suffixes]
        if not found:
            raise InputNotFoundError(
                f"{name}: is a folder without files of JSON lines or Parquet "
                f"({', '.join(suffixes)}, compressed or not); name a file, or use --dataset"
            )
        if len(found) < len(entries):
            logger.warning(
                "%s: %d files are read, and %d are not, since their names do not end in %s",
                name,
                len(found),
                len(entries) - len(found),
                ", ".join(suffixes),
            )
        return [*found]
    if glob.has_magic(name) and not path.exists():
        matches = _matches(name) if isinstance(path, Path) else match_objects(path)
        if not matches:
            raise InputNotFoundError(f"{name}: no file matches this pattern")
        return [*matches]
    return [path]


def _files_below(folder: Location) -> list[Location]:
    """Return the files in a folder and its subfolders, sorted, without hidden ones."""
    if isinstance(folder, Path):
        return [folder / entry for entry in sorted(walk(folder))]
    return sorted(
        file
        for file in folder.walk_files()
        if not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    )


def _matches(pattern: str) -> list[Path]:
    matches = sorted(glob.glob(pattern, recursive=True))
    return [Path(match) for match in matches if Path(match).is_file()]


def _open(path: str | Location) -> JsonlFile | ArrowFile:
    file = Path(path) if isinstance(path, str) else path
    suffix = suffix_of(file)
    if path == STANDARD_INPUT or not file.is_file():
        return JsonlFile(path)
    # Of many objects in a store, the first bytes are not requested.
    is_known = suffix in JSONL_SUFFIXES and not isinstance(file, Path)
    if suffix in PARQUET_SUFFIXES or (not is_known and read_head(file).startswith(b"PAR1")):
        return ArrowFile(file, str(file))
    return JsonlFile(path)
