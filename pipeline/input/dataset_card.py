"""The `configs` of a dataset card: which files README.md says belong to which split."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.errors import InputNotFoundError
from gptbatch.pipeline.system.yaml_reader import YamlError, parse_yaml_mapping

CARD = "README.md"
_KNOWN_KEYS = {
    "config_name",
    "data_files",
    "data_dir",
    "default",
    "description",
    "sep",
    "delimiter",
    "version",
}


@dataclass(frozen=True)
class CardConfig:
    """One of the `configs`. splits: the files of each split by name. delimiter: of its CSV files, None where it says nothing."""

    splits: dict[str, list[str]]
    delimiter: str | None


class DatasetCard:
    """A README.md with front matter.

    Args:
        where: the dataset as messages name it.
        text: the content of its README.md, "" without one.

    Raises:
        InputNotFoundError: the front matter is not YAML.
    """

    def __init__(self, where: str, text: str) -> None:
        self.where = f"{where}/{CARD}"
        match = re.match(r"\ufeff?\s*---\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
        try:
            configs = parse_yaml_mapping(match[1].encode()).get("configs") if match else None
        except YamlError as error:
            raise InputNotFoundError(f"{self.where}: the front matter: {error}") from error
        entries = (
            [entry for entry in configs if isinstance(entry, dict)]
            if isinstance(configs, list)
            else []
        )
        self.entries = {str(entry.get("config_name", "default")): entry for entry in entries}

    def choose(self, wanted: str | None) -> str:
        """The configuration to use: the wanted one, the default one, or the only one. Raises InputNotFoundError."""
        if wanted is None:
            marked = [
                name
                for name, entry in self.entries.items()
                if entry.get("default") is True or name == "default"
            ]
            wanted = (
                marked[0]
                if marked
                else next(iter(self.entries))
                if len(self.entries) == 1
                else None
            )
        if wanted is None or wanted not in self.entries:
            asked = "" if wanted is None else f" {wanted!r}: there is none"
            raise InputNotFoundError(
                f"{self.where}: needs a dataset_config{asked}; it names {', '.join(self.entries)}"
            )
        strange = sorted(map(str, set(self.entries[wanted]) - _KNOWN_KEYS))
        if strange:
            raise InputNotFoundError(
                f"{self.where}: config {wanted!r} sets {', '.join(strange)}, which is not followed"
            )
        return wanted

    def config(
        self, name: str, names: list[str], by_name: Callable[[list[str]], dict[str, list[str]]]
    ) -> CardConfig:
        """The files of a configuration.

        Args:
            name: of the configuration.
            names: of all files of the dataset, relative, with slashes.
            by_name: gives the splits of files where the configuration names none.

        Raises:
            InputNotFoundError: it names a file that is not there.
        """
        entry = self.entries[name]
        delimiter = entry.get("sep", entry.get("delimiter"))
        folder = (
            str(entry["data_dir"]).strip("./") + "/"
            if isinstance(entry.get("data_dir"), str)
            else ""
        )
        folder = "" if folder == "/" else folder
        inside = [file.removeprefix(folder) for file in names if file.startswith(folder)]
        declared = entry.get("data_files")
        splits: dict[str, list[str]] = {}
        if declared is None:
            splits = by_name(inside)
        else:
            for split, pattern in self._patterns(declared):
                if not (found := _matching(pattern, inside)):
                    raise InputNotFoundError(
                        f"{self.where}: config {name!r} names {folder}{pattern}, which is not there"
                    )
                splits.setdefault(split, []).extend(
                    file for file in found if file not in splits.get(split, ())
                )
        return CardConfig(
            {split: [folder + file for file in files] for split, files in splits.items()},
            delimiter if isinstance(delimiter, str) else None,
        )

    def _patterns(self, declared: Any) -> list[tuple[str, str]]:
        """(split, pattern) of a value of data_files: a path, a list of paths, a mapping, or a list of {split, path}."""
        if isinstance(declared, str) or (
            isinstance(declared, list) and all(isinstance(item, str) for item in declared)
        ):
            declared = {"train": declared}
        if isinstance(declared, dict):
            declared = [{"split": split, "path": path} for split, path in declared.items()]
        found = []
        for item in declared if isinstance(declared, list) else [None]:
            if not isinstance(item, dict) or not isinstance(item.get("path"), (str, list)):
                raise InputNotFoundError(
                    f"{self.where}: data_files must give a split and a path each"
                )
            paths = [item["path"]] if isinstance(item["path"], str) else item["path"]
            found += [
                (str(item.get("split", "train")), str(path).removeprefix("./")) for path in paths
            ]
        return found


def _matching(pattern: str, names: list[str]) -> list[str]:
    """The names that a pattern of glob means, `**` for folders of any depth; a file of that very name is that file."""
    if pattern in names:
        return [pattern]
    expression = re.compile(_as_expression(pattern), re.DOTALL)
    return [name for name in names if expression.fullmatch(name)]


def _as_expression(pattern: str) -> str:
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known[piece]
        if piece in known
        else piece.replace("[!", "[^")
        if piece.startswith("[") and piece.endswith("]")
        else re.escape(piece)
        for piece in pieces
    )
