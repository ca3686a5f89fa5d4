"""Reads the `configs` of a dataset card: the files of each split, declared in README.md."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.errors import InputNotFoundError
from gptbatch.pipeline.system.yaml_reader import YamlError, parse_yaml_mapping

CARD = "README.md"
_SUPPORTED_KEYS = {
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
    """One of the `configs`.

    Attributes:
        splits: Split name -> files.
        delimiter: Of its CSV files. None where the card does not declare one.
    """

    splits: dict[str, list[str]]
    delimiter: str | None


class DatasetCard:
    """A README.md with front matter.

    Args:
        where: The dataset in messages.
        text: The content of its README.md, "" without one.

    Raises:
        InputNotFoundError: The front matter is not YAML.
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

    def select(self, requested: str | None) -> str:
        """Return the name of the configuration to use.

        Args:
            requested: Its name. None takes the default one, or the only one.

        Raises:
            InputNotFoundError: There is none, or it has keys that are not supported.
        """
        name = self._default() if requested is None else requested
        if name is None or name not in self.entries:
            problem = "" if name is None else f" {name!r}: there is none"
            raise InputNotFoundError(
                f"{self.where}: needs a dataset_config{problem}; it names {', '.join(self.entries)}"
            )
        unsupported = sorted(map(str, set(self.entries[name]) - _SUPPORTED_KEYS))
        if unsupported:
            raise InputNotFoundError(
                f"{self.where}: config {name!r} sets {', '.join(unsupported)}, which is not "
                "followed"
            )
        return name

    def _default(self) -> str | None:
        for name, entry in self.entries.items():
            if entry.get("default") is True or name == "default":
                return name
        return next(iter(self.entries)) if len(self.entries) == 1 else None

    def config(
        self, name: str, names: list[str], by_name: Callable[[list[str]], dict[str, list[str]]]
    ) -> CardConfig:
        """Return the files of a configuration.

        Args:
            name: The configuration.
            names: All files of the dataset, relative and with slashes.
            by_name: Returns the splits of files by their names, for a configuration without
                data_files.

        Raises:
            InputNotFoundError: It names a file that does not exist.
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
        """Return (split, pattern) pairs of data_files.

        Its value is a path, a list of paths, a mapping of splits, or a list of {split, path}.
        """
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
    """Return the names that match a glob pattern. A name equal to the pattern matches alone."""
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
