"""Reads splits of datasets from files that are local or can be downloaded one by one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError
from gptbatch.pipeline.input.dataset_files import (
    DatasetFiles,
    check_shards,
    find_files,
    read_rows,
    suffix_of,
)
from gptbatch.pipeline.input.source import START, Place, RawRow

logger = logging.getLogger("gptbatch")

_MAX_NAMED_FILES = 5


class Splits(Protocol):
    """The splits of one dataset. Both methods raise InputNotFoundError for a missing split."""

    def rows(self, split: str, start: Place = START) -> Iterator[RawRow]:
        """Yield the rows of a split in order, from a place on."""

    def length(self, split: str) -> int:
        """Return the number of rows of a split."""


class FileSplits:
    """Splits of a dataset of files.

    Args:
        where: The dataset in messages.
        files: The files of each split.
        fetch: Returns the path of a file by its name. Called when its rows are read.
        display_name: Returns the name of a file in messages.
        delimiter: Of CSV files. None takes that of the dataset card or of the suffix.
    """

    def __init__(
        self,
        where: str,
        files: DatasetFiles,
        fetch: Callable[[str], Path],
        display_name: Callable[[str], str],
        delimiter: str | None,
    ) -> None:
        self._where, self._files, self._fetch = where, files, fetch
        self._display_name = display_name
        self._delimiter = delimiter or files.delimiter
        if left_out := files.left_out:
            more = (
                f" and {len(left_out) - _MAX_NAMED_FILES} more"
                if len(left_out) > _MAX_NAMED_FILES
                else ""
            )
            logger.warning(
                "%s: files that no split takes are not read: %s%s",
                where,
                ", ".join(left_out[:_MAX_NAMED_FILES]),
                more,
            )

    def rows(self, split: str, start: Place = START) -> Iterator[RawRow]:
        """Yield the rows of all files of a split, from a place on. Does not open files before."""
        names = self._of_split(split)
        position, begin = start.position, start._replace(position=start.row)
        for index, name in islice(enumerate(names), start.file, None):
            path, shown = self._fetch(name), self._display_name(name)
            for row in read_rows(path, shown, self._delimiter, begin):
                yield RawRow(
                    where=row.where,
                    position=row.position if len(names) == 1 else position,
                    parse=row.parse,
                    file=index,
                    offset=row.offset,
                )
                position += 1
            begin = START

    def length(self, split: str) -> int:
        """Return the number of rows of a split. Reads all files but Parquet files."""
        return sum(
            _count_rows(self._fetch(name), self._display_name(name), self._delimiter)
            for name in self._of_split(split)
        )

    def _of_split(self, split: str) -> list[str]:
        splits = self._files.splits
        if split not in splits:
            found = "; ".join(
                f"{name} ({names[0] if len(names) == 1 else f'{len(names)} files'})"
                for name, names in splits.items()
            )
            raise InputNotFoundError(
                f"{self._where}: there is no split {split!r}; there are {found}; "
                "a split follows from names of folders and files, or name one file with --dataset"
            )
        check_shards(self._where, splits[split])
        return splits[split]


def local_splits(path: Path, where: str, config: str | None, delimiter: str | None) -> Splits:
    """Return the splits of an existing file or folder.

    Args:
        path: A file, a folder of files, or a folder that `save_to_disk` wrote.
        where: The dataset in messages.
        config: Name of one of the `configs` in its README.md. None takes the default.
        delimiter: Of CSV files. None takes the default.

    Raises:
        InputNotFoundError: There are no data files, or no such config.
    """
    if path.is_file():
        if config is not None:
            raise InputNotFoundError(f"{path}: is a file, which has no dataset_config {config!r}")
        return FileSplits(
            where,
            DatasetFiles({"train": [path.name]}),
            lambda _: path,
            lambda _: str(path),
            delimiter,
        )
    files = _saved_files(path) if _is_saved(path) else find_files(path, config)
    return FileSplits(
        where, files, lambda name: path / name, lambda name: str(path / name), delimiter
    )


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved_files(path: Path) -> DatasetFiles:
    """Return the Arrow files of each split of a `save_to_disk` folder."""
    try:
        if (path / "dataset_dict.json").is_file():
            names = [
                Path(name).name
                for name in json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            ]
            return DatasetFiles({name: _saved_split(path, f"{name}/")[1] for name in names})
        split, files = _saved_split(path, "")
        return DatasetFiles({split or "train": files})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputNotFoundError(
            f"{path}: cannot be loaded: it looks like a save_to_disk folder that is damaged "
            f"({error})"
        ) from error


def _saved_split(path: Path, folder: str) -> tuple[str | None, list[str]]:
    """Return the name of a saved split, None where it is not recorded, and its files."""
    state = json.loads((path / folder / "state.json").read_bytes())
    if state.get("_indices_data_files"):
        raise ValueError(
            "an old version of datasets saved it with indices; load it and save it again"
        )
    files = [folder + Path(entry["filename"]).name for entry in state["_data_files"]]
    if missing := [file for file in files if not (path / file).is_file()]:
        raise ValueError(f"{missing[0]} is missing")
    split = state.get("_split")
    return split if isinstance(split, str) else None, files


def _count_rows(file: Path, name: str, delimiter: str | None) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if suffix_of(file) in (".parquet", ".pq"):
        try:
            with file.open("rb") as stream:
                rows: int = pq.read_metadata(stream).num_rows
            return rows
        except (OSError, pa.ArrowException) as error:
            raise InputRowsError(f"{name}: the file is damaged or cut off ({error})") from error
    return sum(1 for _ in read_rows(file, name, delimiter))
