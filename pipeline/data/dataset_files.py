"""The files of a local dataset, by split: a file, or a folder as the Hugging Face hub lays it out.

    data/train-00000-of-00002.parquet    sharded: the name before the dash is the split
    test/rows.csv                        a folder called train, validation, test or the like
    train.jsonl, my_test_part.csv        a file whose name holds such a word
    a.jsonl, b.jsonl                     else all files are the split train

The first of these rules that any file matches decides for all files, unless README.md says in its `configs` which files belong to which
split. Files that no split takes are returned as well, so that none is left out silently.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.arrow_file import ArrowFile
from pipeline.data.csv_file import CsvFile
from pipeline.data.file_kind import read_head
from pipeline.data.json_file import JsonFile, PlainTextFile
from pipeline.data.jsonl import JsonlFile
from pipeline.data.rows import RawRow
from pipeline.data.yaml_reader import YamlError, parse_yaml_mapping
from pipeline.errors import InputNotFoundError

MAX_FILES = 100_000
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
ARROW_SUFFIXES = (".parquet", ".pq", ".arrow", ".feather")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_SHARDED = re.compile(r"(?:.*/)?data/(?P<split>\w+(?:\.\w+)*)-(?P<number>\d{5})-of-(?P<count>\d{5}).*")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>[^/]*)")
_SEPARATORS = re.compile(r"[-._ 0-9]+")
# files of a dataset repository, a clone or a cluster job that hold no rows
_NO_DATA = re.compile(
    r"readme.*|licen[cs]e.*|citation.*|dataset_infos\.json|dataset_dict\.json|_success|_manifest\.json|_(common_)?metadata|.*\.(md|py|lock|crc)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DatasetFiles:
    """The files of each split, in the order in which they are read. left_out: data files that no split takes."""

    splits: dict[str, list[Path]]
    left_out: list[Path] = field(default_factory=list)
    delimiter: str | None = None


def find_files(path: Path, config: str | None) -> DatasetFiles:
    """Find the splits of a local dataset.

    Args:
        path: a file or a folder that exists.
        config: name of one of the `configs` in the folder's README.md.

    Raises:
        InputNotFoundError: there are no data files, no such config, or a shard is missing.
    """
    if path.is_file():
        if config is not None:
            raise InputNotFoundError(f"{path}: is a file, which has no dataset_config {config!r}")
        return DatasetFiles({"train": [path]})
    files = sorted(_walk(path), key=lambda file: file.relative_to(path).parts)
    configs = _readme_configs(path)
    if configs:
        found = _configured(path, files, configs, config)
    elif config is not None:
        raise InputNotFoundError(f"{path}: has no dataset_config {config!r}; its README.md names none")
    else:
        splits = split_by_name([file.relative_to(path) for file in _with_rows(files)])
        taken = {path / name for names in splits.values() for name in names}
        found = DatasetFiles(
            {split: [path / name for name in names] for split, names in splits.items()}, [file for file in files if file not in taken]
        )
    if not found.splits:
        kinds = ", ".join(sorted({file.suffix or file.name for file in found.left_out})[:5])
        raise InputNotFoundError(
            f"{path}: the folder holds no data files ({', '.join((*TEXT_SUFFIXES, *ARROW_SUFFIXES))}, compressed or not)"
            + (f", only {kinds}" if kinds else "")
        )
    for names in found.splits.values():
        _check_shards(path, names)
    return found


def split_by_name(names: list[Path]) -> dict[str, list[Path]]:
    """The files of each split by the rules above. Names that no split takes are in none."""

    def sharded(name: Path) -> str | None:
        match = _SHARDED.fullmatch(name.as_posix())
        return match["split"] if match else None

    def folder(name: Path) -> str | None:
        return next((split for part in name.parts[:-1] if (split := _split_in(part))), None)

    for rule in (sharded, folder, lambda name: _split_in(name.name)):
        splits: dict[str, list[Path]] = {}
        for name in names:
            if (split := rule(name)) is not None:
                splits.setdefault(split, []).append(name)
        if splits:
            return splits
    return {"train": names} if names else {}


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
    suffix = suffix_of(path)
    if suffix in ARROW_SUFFIXES or read_head(path).startswith((b"PAR1", b"ARROW1")):
        return ArrowFile(path, name).rows()
    if suffix in (".csv", ".tsv"):
        return CsvFile(path, name, delimiter or ("\t" if suffix == ".tsv" else ",")).rows()
    if suffix == ".txt":
        return PlainTextFile(path, name).rows()
    if suffix == ".json":
        return JsonFile(path, name).rows()
    if suffix in (".jsonl", ".ndjson"):
        return JsonlFile(path).rows()
    raise InputNotFoundError(
        f"{name}: a file must end in {', '.join((*TEXT_SUFFIXES, *ARROW_SUFFIXES))}, or these with .gz, .zst, .bz2, .xz"
    )


def _split_in(name: str) -> str | None:
    return next((_SPLIT_OF_WORD[word] for word in _SEPARATORS.split(name.lower()) if word in _SPLIT_OF_WORD), None)


def _walk(folder: Path) -> Iterator[Path]:
    """All files but hidden ones and those that hold no rows by their name. Links to folders are followed once."""
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
            if name.startswith(".") or _NO_DATA.fullmatch(name) or not os.path.isfile(os.path.join(root, name)):
                continue
            count += 1
            if count > MAX_FILES:
                raise InputNotFoundError(f"{folder}: holds more than {MAX_FILES} files; name a smaller folder")
            yield Path(root, name)


def _with_rows(files: list[Path]) -> list[Path]:
    """The files that may hold rows, by suffix. Text files only where there are no others: they may be notes."""
    found = [file for file in files if suffix_of(file) in (*TEXT_SUFFIXES, *ARROW_SUFFIXES)]
    return [file for file in found if suffix_of(file) != ".txt"] or found


def _check_shards(folder: Path, files: list[Path]) -> None:
    """Raises InputNotFoundError when a set of shards, `...-00000-of-00003...`, is not whole."""
    counts: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(str(file)):
            counts.setdefault((match["stem"], match["count"], match["rest"]), set()).add(int(match["number"]))
    for (stem, count, rest), numbers in counts.items():
        missing = sorted(set(range(int(count))) - numbers)
        if missing:
            name = f"{Path(stem).name}-{missing[0]:05d}-of-{count}{rest}"
            raise InputNotFoundError(
                f"{folder}: {len(missing)} of {int(count)} shards are missing, the first {name}; fetch the dataset again"
            )


# -- configs of README.md ------------------------------------------------------------------------------------------------


def _readme_configs(folder: Path) -> list[dict[str, Any]]:
    """The `configs` of a dataset card's front matter; [] without any."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    match = re.match(r"\s*---\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
    if match is None:
        return []
    try:
        configs = parse_yaml_mapping(match[1].encode()).get("configs")
    except YamlError as error:
        raise InputNotFoundError(f"{folder / 'README.md'}: the front matter: {error}") from error
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def _configured(folder: Path, files: list[Path], configs: list[dict[str, Any]], wanted: str | None) -> DatasetFiles:
    names = [str(entry.get("config_name", "default")) for entry in configs]
    if wanted is None:
        marked = [name for name, entry in zip(names, configs, strict=True) if entry.get("default") is True or name == "default"]
        wanted = marked[0] if marked else names[0] if len(names) == 1 else None
    if wanted is None or wanted not in names:
        asked = "" if wanted is None else f" {wanted!r}: there is none"
        raise InputNotFoundError(f"{folder}: needs a dataset_config{asked}; README.md names {', '.join(names)}")
    taken: set[Path] = set()
    chosen: dict[str, list[Path]] = {}
    for name, entry in zip(names, configs, strict=True):
        splits = _data_files(folder, files, entry)
        taken.update(file for paths in splits.values() for file in paths)
        if name == wanted:
            chosen = splits
    entry = configs[names.index(wanted)]
    strange = set(entry) - {"config_name", "data_files", "data_dir", "default", "description", "sep", "delimiter", "version"}
    if strange:
        raise InputNotFoundError(
            f"{folder}/README.md: config {wanted!r} sets {', '.join(sorted(map(str, strange)))}, which is not followed"
        )
    if not chosen:
        raise InputNotFoundError(f"{folder}/README.md: config {wanted!r} names no files that are there")
    delimiter = entry.get("sep", entry.get("delimiter"))
    return DatasetFiles(chosen, [file for file in files if file not in taken], delimiter if isinstance(delimiter, str) else None)


def _data_files(folder: Path, files: list[Path], entry: dict[str, Any]) -> dict[str, list[Path]]:
    base = folder / str(entry["data_dir"]) if isinstance(entry.get("data_dir"), str) else folder
    declared = entry.get("data_files")
    if declared is None:
        inside = [file for file in files if base in file.parents]
        splits = split_by_name([file.relative_to(base) for file in _with_rows(inside)])
        return {split: [base / name for name in names] for split, names in splits.items()}
    if isinstance(declared, str) or (isinstance(declared, list) and all(isinstance(item, str) for item in declared)):
        declared = [{"split": "train", "path": declared}]
    if isinstance(declared, dict):
        declared = [{"split": split, "path": path} for split, path in declared.items()]
    found: dict[str, list[Path]] = {}
    for item in declared:
        if not isinstance(item, dict) or "path" not in item:
            raise InputNotFoundError(f"{folder}/README.md: data_files must give a split and a path each")
        for pattern in [item["path"]] if isinstance(item["path"], str) else item["path"]:
            found.setdefault(str(item.get("split", "train")), []).extend(_matching(base, str(pattern)))
    return {split: list(dict.fromkeys(paths)) for split, paths in found.items() if paths}


def _matching(base: Path, pattern: str) -> list[Path]:
    """The files that a pattern names; a file of that very name is that file. Nothing outside of the folder is named."""
    if (base / pattern).is_file():
        names = [pattern]
    else:
        names = [name for name in glob.glob(pattern, root_dir=base, recursive=True) if (base / name).is_file()]
    paths = sorted((base / name for name in names), key=lambda file: file.parts)
    return [path for path in paths if ".." not in Path(os.path.relpath(path, base)).parts]
