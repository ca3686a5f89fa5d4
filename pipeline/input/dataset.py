"""Reads a split of a dataset: local files, a `save_to_disk` folder, or a dataset on the hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

from gptbatch.pipeline.errors import InputNotFoundError
from gptbatch.pipeline.input.dataset_files import ARROW_SUFFIXES, TEXT_SUFFIXES, suffix_of, walk
from gptbatch.pipeline.input.hub_dataset import HubDataset
from gptbatch.pipeline.input.local_dataset import Splits, local_splits
from gptbatch.pipeline.input.source import START, Place, RawRow
from gptbatch.pipeline.input.split import SplitPart, parse_split
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.system.bundled import locate

logger = logging.getLogger("gptbatch")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HIVE = re.compile(rf"(?:^|/)((?:{'|'.join(('prompt_id', 'id', *SAMPLING_SETTINGS))})=[^/]*)")
_MAX_REMEMBERED_FILES = 10_000


class DatasetSplit:
    """The rows of a split of a dataset, or of slices and sums of splits.

    The position of a row is its position in its split, also in a slice. Rows of several splits are
    numbered consecutively.

    Args:
        dataset: A file, a folder, or a name on the hub.
        config: Name of a configuration of the dataset. None takes the default.
        split: A split expression: `train`, `train[50%:]`, `train+test`.
        revision: Branch, tag or commit of a hub dataset. None takes the default branch.
        delimiter: Of CSV files. None takes a comma, and a tab for `.tsv`.
    """

    def __init__(
        self,
        *,
        dataset: str,
        config: str | None,
        split: str,
        revision: str | None,
        delimiter: str | None = None,
    ) -> None:
        self.name = f"{dataset}[{split}]"
        self._dataset, self._config, self._split = dataset, config, split
        self._revision, self._delimiter = revision, delimiter

    def files(self) -> list[Path] | None:
        """Return all files of a local dataset, and no files for a commit, which never changes."""
        path = locate(self._dataset)
        if path.is_file():
            return [path]
        if path.is_dir():
            files = [path / name for name in islice(walk(path), _MAX_REMEMBERED_FILES + 1)]
            return sorted(files) if len(files) <= _MAX_REMEMBERED_FILES else None
        return [] if self._revision is not None and _COMMIT.fullmatch(self._revision) else None

    def rows(self, start: Place = START) -> Iterator[RawRow]:
        """Yield the rows, from a place on.

        One split from its first row on is read as its files allow, see `read_rows`. In other
        slices and in sums, the rows before `start` are read, and skipped.

        Raises:
            InputNotFoundError: There is no such dataset, configuration or split.
        """
        try:
            parts = parse_split(self._split)
        except ValueError as error:
            raise InputNotFoundError(f"{self.name}: {error}") from error
        terms = [(part.name, *self._bounds(part)) for part in parts]
        (name, first, stop), *others = terms
        if first > 0 or others:
            yield from islice(self._rows(terms), start.position, None)
            return
        left = None if stop is None else max(0, stop - start.position)
        for row in islice(self._backend.rows(name, start), left):
            yield RawRow(
                where=row.where,
                position=row.position,
                parse=row.parse,
                file=row.file,
                offset=row.offset,
            )

    def _rows(self, terms: list[tuple[str, int, int | None]]) -> Iterator[RawRow]:
        """Yield the rows of slices and sums, each with the name, first row and end of a split."""
        several = len({name for name, _, _ in terms}) > 1
        count = 0
        for name, first, stop in terms:
            for row in islice(self._backend.rows(name), first, stop):
                position = count if several else row.position
                yield RawRow(where=row.where, position=position, parse=row.parse)
                count += 1

    def _bounds(self, part: SplitPart) -> tuple[int, int | None]:
        """Return the first row of a term, and the row after its last; None for all rows."""
        if part.is_whole:
            return 0, None
        length = self._backend.length(part.name) if part.needs_length else 2**63 - 1
        return part.bounds(length)

    @cached_property
    def _backend(self) -> Splits:
        path = locate(self._dataset)
        if path.exists():
            if match := _HIVE.search(str(path)):
                logger.warning(
                    "%s: %s in a folder's name is not read as a column", self.name, match[1]
                )
            return local_splits(path, self.name, self._config, self._delimiter)
        looks_like_path = (
            self._dataset.startswith((".", os.sep, "~"))
            or self._dataset.count("/") > 1
            or suffix_of(path) in (*TEXT_SUFFIXES, *ARROW_SUFFIXES)
        )
        if looks_like_path or not _HUB_NAME.fullmatch(self._dataset):
            raise InputNotFoundError(f"{self._dataset}: no such file or folder")
        return HubDataset(
            dataset=self._dataset,
            where=self.name,
            config=self._config,
            revision=self._revision,
            delimiter=self._delimiter,
        ).splits()
