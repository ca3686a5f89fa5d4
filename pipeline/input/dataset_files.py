"""The files of a dataset, by split: a folder, or a repository of the Hugging Face hub.

    data/train-00000-of-00002.parquet    sharded: the name before the dash is the split
    test/rows.csv                        a folder called train, validation, test or the like
    train.jsonl, my_test_part.csv        a file whose name holds such a word
    a.jsonl, b.jsonl                     else all files are the split train

The first of these rules that any file matches decides for all files, unless README.md says in its `configs` which files belong to which
split. Files that no split takes are returned as well, so that none is left out silently.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gptbatch.pipeline.errors import InputNotFoundError
from gptbatch.pipeline.input.arrow_file import ArrowFile
from gptbatch.pipeline.input.compression import COMPRESSED_SUFFIXES
from gptbatch.pipeline.input.csv_file import CsvFile
from gptbatch.pipeline.input.dataset_card import CARD, DatasetCard
from gptbatch.pipeline.input.file_kind import describe_binary, read_head
from gptbatch.pipeline.input.json_file import JsonFile
from gptbatch.pipeline.input.jsonl import JsonlFile
from gptbatch.pipeline.input.source import RawRow
from gptbatch.pipeline.input.text_file import TextFile

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
# files of a dataset repository, a clone or a cluster job that hold no rows
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|citation)(\.(md|txt|rst|bib|cff))?|dataset_infos\.json|dataset_dict\.json|_success|_manifest\.json|_(common_)?metadata|.*\.(md|py|lock|crc)",
    re.IGNORECASE,
)


class NoDataFilesError(InputNotFoundError):
    """A dataset without files of a format that is read here."""


@dataclass(frozen=True)
class DatasetFiles:
    """The files of each split, relative and with slashes, in the order in which they are read.

    left_out: files that no split takes. delimiter: of CSV files, None where nothing says it.
    """

    splits: dict[str, list[str]]
    left_out: list[str] = field(default_factory=list)
    delimiter: str | None = None


def find_files(path: Path, config: str | None) -> DatasetFiles:
    """Find the splits of a local dataset.

    Args:
        path: a folder.
        config: name of one of the `configs` in the folder's README.md.

    Raises:
        InputNotFoundError: there are no data files, or no such config.
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
            f"{path}: holds folders that save_to_disk made; name one of them: {', '.join(saved[:5])}"
        )
    try:
        card = (path / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        card = ""
    return arrange(str(path), names, card, config)


def arrange(where: str, names: list[str], card: str, config: str | None) -> DatasetFiles:
    """The splits of a dataset with files of these names.

    Args:
        where: the dataset as messages name it.
        names: relative, with slashes.
        card: the text of its README.md.
        config: as for `find_files`.
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
        chosen = configs.choose(config)
        splits, delimiter = (
            (found := configs.config(chosen, names, _by_name)).splits,
            found.delimiter,
        )
        others = [
            configs.config(name, names, _by_name) for name in configs.entries if name != chosen
        ]
        taken = {
            name for entry in (found, *others) for files in entry.splits.values() for name in files
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
            f"{where}: holds no data files ({known}, compressed or not){f', only {kinds}' if kinds else ''}"
        )
    return DatasetFiles(splits, left_out, delimiter)


def _by_name(names: list[str]) -> dict[str, list[str]]:
    return split_by_name(_with_rows(names))


def split_by_name(names: list[str]) -> dict[str, list[str]]:
    """The files of each split by the rules above. Names that no split takes are in none."""

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
    """Raises InputNotFoundError when a set of shards of a split, `...-00000-of-00003...`, is not whole."""
    shards: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault((match["stem"], match["count"]), {})[int(match["number"])] = match[
                "rest"
            ]
    for (stem, count), found in shards.items():
        numbers = (
            range(1, int(count) + 1)
            if int(count) in found and 0 not in found
            else range(int(count))
        )
        if missing := [number for number in numbers if number not in found]:
            first = f"{stem}-{missing[0]:05d}-of-{count}{next(iter(found.values()))}"
            raise InputNotFoundError(
                f"{where}: {len(missing)} of {int(count)} shards are missing, the first {first}; fetch it again"
            )


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, in lower case: `.csv` for `A.CSV.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_rows(path: Path, name: str, delimiter: str | None) -> Iterator[RawRow]:
    """The rows of one file. Parquet and Arrow files are told by their content, all others by their suffix.

    Raises:
        InputNotFoundError: the suffix is of no format that is read.
    """
    suffix, head = suffix_of(path), read_head(path)
    if suffix in ARROW_SUFFIXES or head.startswith((b"PAR1", b"ARROW1")):
        return ArrowFile(path, name).rows()
    if suffix in (".csv", ".tsv"):
        return CsvFile(path, name, delimiter or ("\t" if suffix == ".tsv" else ",")).rows()
    if suffix == ".txt":
        return TextFile(path, name).rows()
    if suffix == ".json":
        return JsonFile(path, name).rows()
    if suffix in (".jsonl", ".ndjson"):
        return JsonlFile(path, name).rows()
    if (kind := describe_binary(head, name)) is not None:
        raise InputNotFoundError(f"{name}: is {kind}")
    known = ", ".join((*TEXT_SUFFIXES, *ARROW_SUFFIXES))
    raise InputNotFoundError(
        f"{name}: a file must end in {known}, text files also in {', '.join(COMPRESSED_SUFFIXES)} after that"
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
    """The names of all files but hidden ones. Links to folders are followed once."""
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
    """The files that may hold rows, by suffix. Text files only where there are no others: they may be notes.

    A folder whose name begins with an underscore, as `_temporary` of Spark, holds none.
    """
    found = [
        name
        for name in names
        if suffix_of(Path(name)) in (*TEXT_SUFFIXES, *ARROW_SUFFIXES)
        and not any(part.startswith("_") for part in name.split("/")[:-1])
    ]
    return [name for name in found if suffix_of(Path(name)) != ".txt"] or found
