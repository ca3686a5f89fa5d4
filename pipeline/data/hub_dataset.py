"""Rows of a split of a Hugging Face dataset: on the hub, a local folder or file, or a `save_to_disk` folder.

Slices and `save_to_disk` folders are memory-mapped Arrow, since a sliced split cannot stream; the rest streams.
Knows: the `datasets` library. Does not know: what the fields mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.bundled import locate
from pipeline.data.rows import RawRow
from pipeline.errors import InputNotFoundError, InputRowsError

_FILE_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_FILES = 10_000


class HubDataset:
    """One split, loaded when its rows are first asked for; raises InputNotFoundError then when it or its dataset is not there."""

    def __init__(self, *, dataset: str, config: str | None, split: str, revision: str | None) -> None:
        self.name = f"{dataset}[{split}]"
        self._where = (dataset, config, split, revision)

    @cached_property
    def _rows(self) -> Iterable[dict[str, Any]]:
        return self._load(*self._where)

    def files(self) -> list[Path] | None:
        """All files of a local dataset; none for a commit of the hub, which never changes."""
        dataset, _, _, revision = self._where
        path = locate(dataset)
        if path.is_file():
            return [path]
        if path.is_dir():
            files = sorted(found for found in path.rglob("*") if found.is_file())
            return files if len(files) <= _MOST_FILES else None
        return [] if revision is not None and _COMMIT.fullmatch(revision) else None

    def rows(self) -> Iterator[RawRow]:
        import pyarrow
        from datasets.exceptions import DatasetsError

        number = 0
        try:
            for fields in self._rows:
                yield RawRow(where=f"{self.name} row {number}", line=number, fields=partial(dict, fields))
                number += 1
        except (DatasetsError, pyarrow.ArrowException, UnicodeDecodeError, ValueError) as error:
            raise InputRowsError(f"{self.name} row {number}: the datasets library cannot read on ({_cause(error)})") from error

    def _load(self, dataset: str, config: str | None, split: str, revision: str | None) -> Iterable[dict[str, Any]]:
        import datasets
        import pyarrow
        from datasets.exceptions import DatasetGenerationError, DatasetsError

        datasets.disable_progress_bars()
        path = locate(dataset)
        try:
            if _is_saved(path):
                return _saved_split(path, split)
            data_files = None
            if path.is_file():
                if path.suffix not in _FILE_BUILDERS:
                    raise InputNotFoundError(f"{dataset}: a file must end in {', '.join(_FILE_BUILDERS)}")
                dataset, data_files = _FILE_BUILDERS[path.suffix], str(path.resolve())
            elif path.is_dir():
                dataset = str(path.resolve())  # a relative one could be the name of one of the library's own loaders
            elif dataset.startswith((".", os.sep, "~")):
                raise InputNotFoundError(f"{dataset}: no such folder or file")
            streaming = "[" not in split and "+" not in split
            rows: Iterable[dict[str, Any]] = datasets.load_dataset(
                dataset, config, data_files=data_files, split=split, revision=revision, streaming=streaming
            )
            return rows
        except (DatasetGenerationError, pyarrow.ArrowException) as error:
            raise InputRowsError(f"{self.name}: cannot be read ({_cause(error)})") from error
        except (DatasetsError, OSError, ValueError, LookupError, TypeError, RuntimeError, StopIteration, yaml.YAMLError) as error:
            # the library has no error of its own for a missing split, a damaged folder and the like
            raise InputNotFoundError(f"{self.name}: cannot be loaded ({error})") from error


def _cause(error: BaseException) -> str:
    """What lies under an error that only says that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved_split(path: Path, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    parts = dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    instructions = datasets.ReadInstruction.from_spec(split).to_absolute({name: part.num_rows for name, part in parts.items()})
    wanted = []
    for instruction in instructions:
        part = parts[instruction.splitname].with_format(None)  # a format may hide columns and change types
        end = min(instruction.to, part.num_rows)
        wanted.append(part.select(range(instruction.from_, end) if instruction.from_ < end else []))
    joined: Iterable[dict[str, Any]] = datasets.concatenate_datasets(wanted)
    return joined
