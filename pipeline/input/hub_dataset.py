"""Reads the splits of a dataset on the Hugging Face hub.

The files of a split are downloaded one by one into the cache of the hub and read as local files.
Rows are therefore the same online and offline. The `datasets` library streams datasets in other
formats, such as archives of images.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError
from gptbatch.pipeline.input.dataset_card import CARD
from gptbatch.pipeline.input.dataset_files import NoDataFilesError, arrange
from gptbatch.pipeline.input.local_dataset import FileSplits, Splits, local_splits
from gptbatch.pipeline.input.source import START, Place, RawRow
from gptbatch.pipeline.system.error_text import first_line

logger = logging.getLogger("gptbatch")

# names of loaders of the datasets library, which would read files of the current folder
_LOADERS = frozenset(
    {
        "csv",
        "json",
        "parquet",
        "arrow",
        "text",
        "xml",
        "pandas",
        "sql",
        "hdf5",
        "lance",
        "spark",
        "generator",
        "cache",
        "webdataset",
        "imagefolder",
        "audiofolder",
        "videofolder",
        "pdffolder",
        "niftifolder",
        "evalfolder",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """A dataset on the hub.

    Attributes:
        dataset: Its name on the hub, OWNER/NAME.
        where: The dataset in messages.
        config: Name of one of its configs. None takes the default.
        revision: Branch, tag or commit. None takes the default branch.
        delimiter: Of CSV files. None takes the default.
    """

    dataset: str
    where: str
    config: str | None
    revision: str | None
    delimiter: str | None

    def splits(self) -> Splits:
        """Find the splits, in the cache if the hub is offline or unreachable.

        Raises:
            InputNotFoundError: There is no such dataset, or it is neither reachable nor cached.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import (
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if self.dataset in _LOADERS:
            raise InputNotFoundError(
                f"{self.dataset}: no such file or folder (and on the hub a dataset is called "
                "OWNER/NAME)"
            )
        datasets_offline = os.environ.get("HF_DATASETS_OFFLINE", "").upper()
        if constants.HF_HUB_OFFLINE or datasets_offline in constants.ENV_VARS_TRUE_VALUES:
            return self._cached() or self._streamed(self.revision)
        try:
            info = HfApi().dataset_info(self.dataset, revision=self.revision)
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise InputNotFoundError(
                f"{self.where}: no such file or folder, and the hub does not give it "
                f"({first_line(error)})"
            ) from error
        except Exception as error:
            if (cached := self._cached()) is None:
                raise InputNotFoundError(
                    f"{self.where}: no such file or folder, and the hub cannot be reached "
                    f"({first_line(error)})"
                ) from error
            logger.warning(
                "%s: the hub cannot be reached; its copy in the cache is read", self.where
            )
            return cached
        return self._online([file.rfilename for file in info.siblings or []], info.sha)

    def _online(self, names: list[str], commit: str | None) -> Splits:
        """Return the splits of the files of a commit. They are downloaded when they are read."""
        from huggingface_hub import hf_hub_download

        def fetch(name: str) -> Path:
            try:
                path = hf_hub_download(self.dataset, name, repo_type="dataset", revision=commit)
                return Path(path)
            except Exception as error:
                raise InputNotFoundError(
                    f"{self.where}: {name} cannot be fetched ({first_line(error)})"
                ) from error

        card = fetch(CARD).read_text(encoding="utf-8", errors="replace") if CARD in names else ""
        try:
            files = arrange(self.where, names, card, self.config)
        except NoDataFilesError:
            return self._streamed(commit)
        return FileSplits(
            self.where, files, fetch, lambda name: f"{self.dataset}/{name}", self.delimiter
        )

    def _cached(self) -> Splits | None:
        """Return the splits in the cache of the hub, None where the dataset is not cached."""
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                self.dataset, repo_type="dataset", revision=self.revision, local_files_only=True
            )
        # the library raises several types for a missing entry
        except Exception:  # noqa: BLE001
            return None
        return local_splits(Path(folder), self.where, self.config, self.delimiter)

    def _streamed(self, revision: str | None) -> LibrarySplits:
        return LibrarySplits(self.dataset, self.where, self.config, revision)


class LibrarySplits:
    """Splits that the datasets library reads.

    They are streamed, or prepared if the number of rows is needed.

    Args:
        dataset: Its name on the hub.
        where: The dataset in messages.
        config: Name of one of its configs. None takes the default.
        revision: Branch, tag or commit. None takes the default branch.
    """

    def __init__(self, dataset: str, where: str, config: str | None, revision: str | None) -> None:
        self._dataset, self._where, self._config, self._revision = dataset, where, config, revision
        self._prepared: dict[str, Any] = {}

    def rows(self, split: str, start: Place = START) -> Iterator[RawRow]:
        """Yield the rows of a split. Those before `start` are read, and skipped."""
        yield from islice(self._rows(split), start.position, None)

    def _rows(self, split: str) -> Iterator[RawRow]:
        rows = (
            self._prepared[split] if split in self._prepared else self._load(split, streaming=True)
        )
        position = 0
        try:
            for fields in rows:
                yield RawRow(
                    where=f"{self._where} row {position}",
                    position=position,
                    parse=partial(dict, fields),
                )
                position += 1
        except Exception as error:
            raise InputRowsError(
                f"{self._where} row {position}: the datasets library cannot read on "
                f"({_root_cause(error)})"
            ) from error

    def length(self, split: str) -> int:
        """Return the number of rows. Prepares the split."""
        if split not in self._prepared:
            self._prepared[split] = self._load(split, streaming=False)
        return len(self._prepared[split])

    def _load(self, split: str, *, streaming: bool) -> Any:
        """Load a split with images and sounds undecoded."""
        import datasets
        from datasets.exceptions import DatasetGenerationError

        datasets.disable_progress_bars()
        try:
            return _undecoded(
                datasets.load_dataset(
                    self._dataset,
                    self._config,
                    split=split,
                    revision=self._revision,
                    streaming=streaming,
                )
            )
        except DatasetGenerationError as error:
            raise InputRowsError(f"{self._where}: cannot be read ({_root_cause(error)})") from error
        except Exception as error:
            # the library raises plain types for a missing split or an unreachable hub
            raise InputNotFoundError(
                f"{self._where}: cannot be loaded ({first_line(error)})"
            ) from error


def _undecoded(rows: Any) -> Any:
    """Return images, sounds and videos as bytes and path, since a decoder may be missing."""
    for column, feature in (rows.features or {}).items():
        if hasattr(feature, "decode_example") and hasattr(feature, "decode"):
            rows = rows.cast_column(column, replace(feature, decode=False))
    return rows


def _root_cause(error: BaseException) -> str:
    """Return the text of the first error of a chain. The later ones only report that it failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
