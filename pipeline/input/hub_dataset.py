"""Splits of a dataset on the Hugging Face hub.

The files of a split are fetched one by one into the hub's cache, and read as local files are, so that a row is the same online and
offline. What has no such files (archives of pictures, say) the `datasets` library streams.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import InputNotFoundError, InputRowsError
from gptbatch.pipeline.input.dataset_card import CARD
from gptbatch.pipeline.input.dataset_files import NoDataFilesError, arrange
from gptbatch.pipeline.input.local_dataset import FileSplits, Splits, local_splits
from gptbatch.pipeline.input.source import RawRow

logger = logging.getLogger("gptbatch")

# Names that the datasets library takes for its own loaders of the files in the current folder.
_LOADERS = frozenset(
    (
        *(
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
        ),
        *("imagefolder", "audiofolder", "videofolder", "pdffolder", "niftifolder", "evalfolder"),
    )
)


def hub_splits(
    dataset: str, where: str, config: str | None, revision: str | None, delimiter: str | None
) -> Splits:
    """The splits of a dataset by its name on the hub; from the hub's cache where the hub cannot be reached.

    Raises:
        InputNotFoundError: there is no such dataset, or it is neither in reach nor in the cache.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if dataset in _LOADERS:
        raise InputNotFoundError(
            f"{dataset}: no such file or folder (and on the hub a dataset is called OWNER/NAME)"
        )
    if (
        constants.HF_HUB_OFFLINE
        or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    ):
        return _cached(dataset, where, config, revision, delimiter) or LibrarySplits(
            dataset, where, config, revision
        )
    try:
        info = HfApi().dataset_info(dataset, revision=revision)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputNotFoundError(
            f"{where}: no such file or folder, and the hub does not give it ({_first_line(error)})"
        ) from error
    except Exception as error:
        if (cached := _cached(dataset, where, config, revision, delimiter)) is None:
            raise InputNotFoundError(
                f"{where}: no such file or folder, and the hub cannot be reached ({_first_line(error)})"
            ) from error
        logger.warning("%s: the hub cannot be reached; its copy in the cache is read", where)
        return cached

    def fetch(name: str) -> Path:
        try:
            return Path(hf_hub_download(dataset, name, repo_type="dataset", revision=info.sha))
        except Exception as error:
            raise InputNotFoundError(
                f"{where}: {name} cannot be fetched ({_first_line(error)})"
            ) from error

    names = [file.rfilename for file in info.siblings or []]
    card = fetch(CARD).read_text(encoding="utf-8", errors="replace") if CARD in names else ""
    try:
        files = arrange(where, names, card, config)
    except NoDataFilesError:
        return LibrarySplits(dataset, where, config, info.sha)
    return FileSplits(where, files, fetch, lambda name: f"{dataset}/{name}", delimiter)


def _cached(
    dataset: str, where: str, config: str | None, revision: str | None, delimiter: str | None
) -> Splits | None:
    """The splits of a dataset in the hub's cache; None when it is not there."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            dataset, repo_type="dataset", revision=revision, local_files_only=True
        )
    except Exception:  # noqa: BLE001  (the library has several errors for a cache that lacks it)
        return None
    return local_splits(Path(folder), where, config, delimiter)


class LibrarySplits:
    """Splits that the datasets library reads: streamed, or prepared where the number of rows must be known."""

    def __init__(self, dataset: str, where: str, config: str | None, revision: str | None) -> None:
        self._dataset, self._where, self._config, self._revision = dataset, where, config, revision
        self._prepared: dict[str, Any] = {}

    def rows(self, split: str) -> Iterator[RawRow]:
        rows = (
            self._prepared[split] if split in self._prepared else self._load(split, streaming=True)
        )
        position = 0
        try:
            for fields in rows:
                yield RawRow(
                    where=f"{self._where} row {position}",
                    line=position,
                    position=position,
                    parse=partial(dict, fields),
                )
                position += 1
        except Exception as error:
            raise InputRowsError(
                f"{self._where} row {position}: the datasets library cannot read on ({_cause(error)})"
            ) from error

    def length(self, split: str) -> int:
        if split not in self._prepared:
            self._prepared[split] = self._load(split, streaming=False)
        return len(self._prepared[split])

    def _load(self, split: str, *, streaming: bool) -> Any:
        """The library's dataset, values of pictures and sounds undecoded."""
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
            raise InputRowsError(f"{self._where}: cannot be read ({_cause(error)})") from error
        except Exception as error:  # the library has no error of its own for a missing split, a hub out of reach and the like
            raise InputNotFoundError(
                f"{self._where}: cannot be loaded ({_first_line(error)})"
            ) from error


def _undecoded(rows: Any) -> Any:
    """Pictures, sounds and videos as the bytes and path that are stored: a decoder may be missing."""
    for column, feature in (rows.features or {}).items():
        if hasattr(feature, "decode_example") and hasattr(feature, "decode"):
            rows = rows.cast_column(column, replace(feature, decode=False))
    return rows


def _cause(error: BaseException) -> str:
    """The error at the bottom of a chain, since those above it only say that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
