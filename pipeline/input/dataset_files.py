"""Assigns the files of a dataset to splits, for local folders and for repositories of the hub.

    data/train-00000-of-00002.parquet    shards: the name before the dash is the split
    test/rows.csv                        a folder named train, validation, test or a synonym
    train.jsonl, my_test_part.csv        a file name that contains such a word
    a.jsonl, b.jsonl                     otherwise all files are the split train

The first rule that matches any file applies to all files. The `configs` of README.md take
precedence. Files in no split are returned too, so that a warning can name them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from gptbatch.pipeline.errors import InputNotFoundError
from gptbatch.pipeline.input.arrow_file import ArrowFile
from gptbatch.pipeline.input.compression import COMPRESSED_SUFFIXES
from gptbatch.pipeline.input.csv_file import CsvFile
from gptbatch.pipeline.input.dataset_card import CARD, DatasetCard
from gptbatch.pipeline.input.file_kind import describe_binary, read_head
from gptbatch.pipeline.input.json_file import JsonFile
from gptbatch.pipeline.input.jsonl import JsonlFile
from gptbatch.pipeline.input.source import START, Place, RawRow
from gptbatch.pipeline.input.text_file import TextFile
from gptbatch.pipeline.storage.location import Location

MAX_FILES = 100_000
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
ARROW_SUFFIXES = (".parquet", ".pq", ".arrow", ".feather")


_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_SHARDED = re.compile(
    r"(?:.*/)?data/(?P<split>\w+(?:\.\w+)*)-(?P<number>\d{5})-of-(?P<count>\d{5}).*"
)
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>[^/]*)")
_SEPARATORS = re.compile(r"[-._ 0-9]+")
# files without rows in dataset repositories, clones and outputs of cluster jobs
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|citation)(\.(md|txt|rst|bib|cff))?|dataset_infos\.json|dataset_dict\.json"
    r"|_success|_manifest\.json|_(common_)?metadata|.*\.(md|py|lock|crc)",
    re.IGNORECASE,
)


class NoDataFilesError(InputNotFoundError):
    """The dataset has no files in a supported format."""


@dataclass(frozen=True)
class DatasetFiles:
    """The files of each split, relative and with slashes.

    Attributes:
        splits: Split name -> files, in reading order.
        left_out: Files in no split.
        delimiter: Of CSV files. None where the card does not declare one.
    """

    splits: dict[str, list[str]]
    left_out: list[str] = field(default_factory=list)
    delimiter: str | None = None


def find_files(path: Path, config: str | None) -> DatasetFiles:
    """Find the splits of a local dataset.

    Args:
        path: A folder.
        config: Name of one of the `configs` in its README.md. None takes the default.

    Raises:
        InputNotFoundError: There are no data files, or no such config.
    """
    names = list(walk(path))
    saved = sorted(
        folder
        for name in names
        if Path(name).name == "state.json"
        and f"{(folder := str(Path(name).parent))}/dataset_info.json" in names
    )
    if saved:
        raise InputNotFoundError(
            f"{path}: holds folders that save_to_disk made; name one of them: "
            f"{', '.join(saved[:5])}"
        )
    try:
        card = (path / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        card = ""
    return arrange(str(path), names, card, config)


def arrange(where: str, names: list[str], card: str, config: str | None) -> DatasetFiles:
    """Assign files to splits.

    Args:
        where: The dataset in messages.
        names: Files, relative and with slashes.
        card: The text of README.md.
        config: As for `find_files`.

    Raises:
        InputNotFoundError: There are no data files, or no such config.
    """
    if any("_delta_log" in name.split("/") for name in names):
        raise InputNotFoundError(
            f"{where}: is a Delta table, whose files may hold deleted rows: export it as Parquet"
        )
    names = sorted(
        (name for name in names if not _NO_DATA.fullmatch(name.rpartition("/")[2])),
        key=lambda name: name.split("/"),
    )
    configs = DatasetCard(where, card)
    delimiter = None
    if configs.entries:
        selected = configs.select(config)
        found = {name: configs.config(name, names, _by_name) for name in configs.entries}
        splits, delimiter = found[selected].splits, found[selected].delimiter
        taken = {
            name for entry in found.values() for files in entry.splits.values() for name in files
        }
    elif config is not None:
        raise InputNotFoundError(
            f"{where}: has no dataset_config {config!r}; its README.md names none"
        )
    else:
        splits = _by_name(names)
        taken = {name for files in splits.values() for name in files}
    left_out = [name for name in names if name not in taken]
    if not splits:
        kinds = ", ".join(sorted({Path(name).suffix or name for name in left_out})[:5])
        known = ", ".join((*TEXT_SUFFIXES, *ARROW_SUFFIXES))
        raise NoDataFilesError(
            f"{where}: holds no data files ({known}, compressed or not)"
            f"{f', only {kinds}' if kinds else ''}"
        )
    return DatasetFiles(splits, left_out, delimiter)


def _by_name(names: list[str]) -> dict[str, list[str]]:
    return split_by_name(_with_rows(names))


def split_by_name(names: list[str]) -> dict[str, list[str]]:
    """Apply the rules above. Files that match no split are left out."""

    def sharded(name: str) -> str | None:
        match = _SHARDED.fullmatch(name)
        return match["split"] if match else None

    def folder(name: str) -> str | None:
        return next((split for part in name.split("/")[:-1] if (split := _split_in(part))), None)

    for rule in (sharded, folder, lambda name: _split_in(name.rpartition("/")[2])):
        splits: dict[str, list[str]] = {}
        for name in names:
            if (split := rule(name)) is not None:
                splits.setdefault(split, []).append(name)
        if splits:
            return splits
    return {"train": names} if names else {}


def check_shards(where: str, names: list[str]) -> None:
    """Raise InputNotFoundError if a set of shards `...-00000-of-00003...` is incomplete."""
    shards: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            found = shards.setdefault((match["stem"], match["count"]), {})
            found[int(match["number"])] = match["rest"]
    for (stem, count), found in shards.items():
        total = int(count)
        # a few datasets count from 1
        start = 1 if total in found and 0 not in found else 0
        if missing := [number for number in range(start, start + total) if number not in found]:
            first = f"{stem}-{missing[0]:05d}-of-{count}{next(iter(found.values()))}"
            raise InputNotFoundError(
                f"{where}: {len(missing)} of {total} shards are missing, the first {first}; "
                "fetch it again"
            )


def suffix_of(path: Location) -> str:
    """Return the suffix of the format in lower case: `.csv` for `A.CSV.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_rows(
    path: Path, name: str, delimiter: str | None, start: Place = START
) -> Iterator[RawRow]:
    """Return the rows of one file.

    The first bytes identify Parquet and Arrow files. The suffix identifies the other formats.

    Args:
        path: The file.
        name: The file in messages.
        delimiter: Of CSV files. None takes a comma, and a tab for `.tsv`.
        start: A place in this file. Parquet is read from its row group, and plain JSON lines from
            its byte. Other files are read from their beginning, and rows are skipped.

    Raises:
        InputNotFoundError: The suffix is not that of a supported format.
    """
    suffix, head = suffix_of(path), read_head(path)
    if suffix in ARROW_SUFFIXES or head.startswith((b"PAR1", b"ARROW1")):
        return ArrowFile(path, name).rows(start)
    if suffix in (".jsonl", ".ndjson"):
        return JsonlFile(path, name).rows(start)
    if suffix in (".csv", ".tsv"):
        csv = CsvFile(path, name, delimiter or ("\t" if suffix == ".tsv" else ","))
        return islice(csv.rows(), start.row, None)
    if suffix == ".txt":
        return islice(TextFile(path, name).rows(), start.row, None)
    if suffix == ".json":
        return islice(JsonFile(path, name).rows(), start.row, None)
    if (kind := describe_binary(head, name)) is not None:
        raise InputNotFoundError(f"{name}: is {kind}")
    known = ", ".join((*TEXT_SUFFIXES, *ARROW_SUFFIXES))
    raise InputNotFoundError(
        f"{name}: a file must end in {known}, text files also in "
        f"{', '.join(COMPRESSED_SUFFIXES)} after that"
    )


def _split_in(name: str) -> str | None:
    return next(
        (
            _SPLIT_OF_WORD[word]
            for word in _SEPARATORS.split(name.lower())
            if word in _SPLIT_OF_WORD
        ),
        None,
    )


def walk(folder: Path) -> Iterator[str]:
    """Yield the names of all files but hidden ones. A linked folder is visited once."""
    seen: set[tuple[int, int]] = set()
    count = 0
    for root, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            if name.startswith(".") or not os.path.isfile(os.path.join(root, name)):
                continue
            count += 1
            if count > MAX_FILES:
                raise InputNotFoundError(
                    f"{folder}: holds more than {MAX_FILES} files; name a smaller folder"
                )
            yield Path(root, name).relative_to(folder).as_posix()


def _with_rows(names: list[str]) -> list[str]:
    """Return the files that may hold rows, by suffix.

    Text files count only where there are no others, since they may be notes. Folders that begin
    with an underscore, such as `_temporary` of Spark, are skipped.
    """
    found = [
        name
        for name in names
        if suffix_of(Path(name)) in (*TEXT_SUFFIXES, *ARROW_SUFFIXES)
        and not any(part.startswith("_") for part in name.split("/")[:-1])
    ]
    return [name for name in found if suffix_of(Path(name)) != ".txt"] or found
