"""Rows of a split of a Hugging Face dataset: on the hub, a local folder or file, or a `save_to_disk` folder.

Slices and `save_to_disk` folders are memory-mapped Arrow, since a sliced split cannot stream; the rest streams.
Knows: the `datasets` library. Does not know: what the fields mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.bundled import locate
from pipeline.data.rows import RawRow
from pipeline.errors import InputNotFoundError, InputRowsError

_FILE_BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class HubDataset:
    """One split. Raises InputNotFoundError when the dataset or the split is not there."""

    def __init__(self, *, dataset: str, config: str | None, split: str, revision: str | None) -> None:
        self.name = f"{dataset}[{split}]"
        self._rows = self._load(dataset, config, split, revision)

    def rows(self) -> Iterator[RawRow]:
        import pyarrow
        from datasets.exceptions import DatasetsError

        number = 0
        try:
            for fields in self._rows:
                yield RawRow(where=f"{self.name} row {number}", line=number, fields=fields)
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
