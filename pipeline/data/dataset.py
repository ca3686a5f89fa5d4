"""Rows of a split of a dataset: local files, a `save_to_disk` folder, or a dataset of the Hugging Face hub.

Local files are read here, with the types that stand in them. The `datasets` library reads what must be fetched from the hub.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.bundled import locate
from pipeline.data.dataset_files import DatasetFiles, find_files, read_rows, suffix_of
from pipeline.data.rows import RawRow
from pipeline.data.split import SplitPart, parse_split
from pipeline.errors import InputNotFoundError, InputRowsError

logger = logging.getLogger("gptbatch")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HIVE = re.compile(r"(prompt_id|id|seed|temperature|top_k|max_new_tokens)=[^/]*")
_MAX_REMEMBERED_FILES = 10_000
_MAX_NAMED_FILES = 5


class DatasetSplit:
    """One split of a dataset, or slices and sums of splits. A row's place is its place in its split, whatever the slice.

    Args:
        dataset: a file, a folder, or a name on the hub.
        config: name of a configuration of the dataset; None takes its default.
        split: as `train`, `train[50%:]`, `train+test`. Rows of several splits are numbered through.
        revision: branch, tag or commit of a hub dataset.
        delimiter: between the cells of CSV files; None takes a comma, or a tab for `.tsv`.

    Raises:
        InputNotFoundError: when rows are first asked for, if there is no such dataset, configuration or split.
    """

    def __init__(self, *, dataset: str, config: str | None, split: str, revision: str | None, delimiter: str | None = None) -> None:
        self.name = f"{dataset}[{split}]"
        self._dataset, self._config, self._split, self._revision, self._delimiter = dataset, config, split, revision, delimiter

    def files(self) -> list[Path] | None:
        """All files of a local dataset; none for a commit of the hub, which never changes."""
        path = locate(self._dataset)
        if path.is_file():
            return [path]
        if path.is_dir():
            files = sorted(found for found in path.rglob("*") if found.is_file())
            return files if len(files) <= _MAX_REMEMBERED_FILES else None
        return [] if self._revision is not None and _COMMIT.fullmatch(self._revision) else None

    def rows(self) -> Iterator[RawRow]:
        try:
            parts = parse_split(self._split)
        except ValueError as error:
            raise InputNotFoundError(f"{self.name}: {error}") from error
        several = len({part.name for part in parts}) > 1
        count = 0
        for part in parts:
            for row in self._slice(part):
                place = count if several else row.place
                yield RawRow(where=row.where, line=place, place=place, fields=row.fields)
                count += 1

    def _slice(self, part: SplitPart) -> Iterator[RawRow]:
        if part.is_whole:
            return iter(self._backend.rows(part.name))
        length = self._backend.length(part.name) if part.needs_length else 2**63 - 1
        start, stop = part.bounds(length)
        return islice(self._backend.rows(part.name), start, stop)

    @cached_property
    def _backend(self) -> _LocalSplits | _HubSplits:
        path = locate(self._dataset)
        if path.exists():
            if match := _HIVE.search(str(path)):
                logger.warning("%s: %s in a folder's name is not read as a column", self.name, match[0])
            return _LocalSplits(path, self.name, self._config, self._delimiter)
        looks_like_path = self._dataset.startswith((".", os.sep, "~")) or self._dataset.count("/") > 1 or suffix_of(path) in _FILE_SUFFIXES
        if looks_like_path or not _HUB_NAME.fullmatch(self._dataset):
            raise InputNotFoundError(f"{self._dataset}: no such file or folder")
        return _HubSplits(self._dataset, self.name, self._config, self._revision, self._delimiter)


_FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".txt", ".gz", ".zst")


class _LocalSplits:
    """Splits of local files."""

    def __init__(self, path: Path, name: str, config: str | None, delimiter: str | None) -> None:
        self.path, self.name = path, name
        self._files = _saved_files(path) if _is_saved(path) else find_files(path, config)
        self._delimiter = delimiter or self._files.delimiter
        if left_out := self._files.left_out:
            shown = ", ".join(str(file.relative_to(path)) for file in left_out[:_MAX_NAMED_FILES])
            more = f" and {len(left_out) - _MAX_NAMED_FILES} more" if len(left_out) > _MAX_NAMED_FILES else ""
            logger.warning("%s: files that no split takes are not read: %s%s", path, shown, more)

    def rows(self, split: str) -> Iterator[RawRow]:
        files = self._of_split(split)
        place = 0
        for file in files:
            for row in read_rows(file, str(file), self._delimiter):
                yield RawRow(where=row.where, line=row.line, place=place, fields=row.fields)
                place += 1

    def length(self, split: str) -> int:
        return sum(_count(file, self._delimiter) for file in self._of_split(split))

    def _of_split(self, split: str) -> list[Path]:
        splits = self._files.splits
        if split not in splits:
            found = "; ".join(f"{name} ({_named(paths)})" for name, paths in splits.items())
            raise InputNotFoundError(
                f"{self.name}: there is no split {split!r}; there are {found}"
                + ("" if self.path.is_file() else "; a split follows from names of folders and files, or name one file with --dataset")
            )
        return splits[split]


class _HubSplits:
    """Splits of a dataset on the hub: streamed, or read from the hub's cache when the hub cannot be reached."""

    def __init__(self, dataset: str, name: str, config: str | None, revision: str | None, delimiter: str | None) -> None:
        self.dataset, self.name, self._config, self._revision, self._delimiter = dataset, name, config, revision, delimiter
        self._cached: _LocalSplits | None = None
        self._prepared: dict[str, Any] = {}  # splits whose length had to be known
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
            self._cached = self._snapshot()

    def rows(self, split: str) -> Iterator[RawRow]:
        if self._cached is not None:
            yield from self._cached.rows(split)
            return
        rows = self._prepared.get(split)
        if rows is None and (rows := self._load(split, streaming=True)) is None:
            assert self._cached is not None
            yield from self._cached.rows(split)
            return
        place = 0
        try:
            for fields in rows:
                yield RawRow(where=f"{self.name} row {place}", line=place, place=place, fields=partial(dict, fields))
                place += 1
        except (GeneratorExit, InputRowsError):
            raise
        except Exception as error:
            raise InputRowsError(f"{self.name} row {place}: the datasets library cannot read on ({_cause(error)})") from error

    def length(self, split: str) -> int:
        if self._cached is not None:
            return self._cached.length(split)
        if split not in self._prepared:
            self._prepared[split] = self._load(split, streaming=False)
        if self._prepared[split] is None:
            assert self._cached is not None
            return self._cached.length(split)
        return len(self._prepared[split])

    def _load(self, split: str, *, streaming: bool) -> Any:
        """The library's dataset, values of pictures and sounds undecoded; None where the hub's cache takes its place."""
        import datasets
        from datasets.exceptions import DatasetGenerationError

        datasets.disable_progress_bars()
        try:
            rows = datasets.load_dataset(self.dataset, self._config, split=split, revision=self._revision, streaming=streaming)
            return _undecoded(rows)
        except DatasetGenerationError as error:
            raise InputRowsError(f"{self.name}: cannot be read ({_cause(error)})") from error
        except Exception as error:
            # the library has no error of its own for a missing split, a hub out of reach and the like
            self._cached = self._snapshot() if isinstance(error, ConnectionError) else None
            if self._cached is None:
                raise InputNotFoundError(f"{self.name}: cannot be loaded ({error})") from error
            logger.warning("%s: the hub cannot be reached; its copy in the cache is read", self.name)
            return None

    def _snapshot(self) -> _LocalSplits | None:
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(self.dataset, repo_type="dataset", revision=self._revision, local_files_only=True)
        except Exception:  # noqa: BLE001  (the library has several errors for a cache that lacks it)
            return None
        return _LocalSplits(Path(folder), self.name, self._config, self._delimiter)


def _undecoded(rows: Any) -> Any:
    """Pictures, sounds and videos as the bytes and path that are stored: a decoder may be missing."""
    for column, feature in (rows.features or {}).items():
        if hasattr(feature, "decode_example") and hasattr(feature, "decode"):
            rows = rows.cast_column(column, replace(feature, decode=False))
    return rows


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved_files(path: Path) -> DatasetFiles:
    """The Arrow files of a `save_to_disk` folder, by split."""
    try:
        if (path / "dataset_dict.json").is_file():
            names = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            return DatasetFiles({name: _saved_split(path / Path(name).name)[1] for name in names})
        split, files = _saved_split(path)
        return DatasetFiles({split or "train": files})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputNotFoundError(f"{path}: cannot be loaded: it looks like a save_to_disk folder that is damaged ({error})") from error


def _saved_split(folder: Path) -> tuple[str | None, list[Path]]:
    state = json.loads((folder / "state.json").read_bytes())
    if state.get("_indices_data_files"):
        raise ValueError("an old version of datasets saved it with indices; load it and save it again")
    files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]} is missing")
    split = state.get("_split")
    return split if isinstance(split, str) else None, files


def _count(file: Path, delimiter: str | None) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if suffix_of(file) in (".parquet", ".pq"):
        try:
            with file.open("rb") as stream:
                rows: int = pq.read_metadata(stream).num_rows
            return rows
        except (OSError, pa.ArrowException) as error:
            raise InputRowsError(f"{file}: the file is damaged or cut off ({error})") from error
    rows_of: Iterable[RawRow] = read_rows(file, str(file), delimiter)
    return sum(1 for _ in rows_of)


def _named(paths: list[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{len(paths)} files"


def _cause(error: BaseException) -> str:
    """The error at the bottom of a chain, since those above it only say that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
