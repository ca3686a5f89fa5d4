"""The table of scores: its schema, and the Parquet file that holds it.

The file appears whole, or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gptbatch.pipeline.errors import ConfigError, StorageError
from gptbatch.pipeline.output.schema import Column
from gptbatch.pipeline.output.single_file import SingleFile
from gptbatch.pipeline.storage.atomic_write import FileWriter

FORMAT = "gptbatch-score-1"
FACTS_KEY = b"gptbatch_score"
_OTHER_SUFFIX = re.compile(
    r"\.(arrow|avro|csv|feather|html?|ipc|jsonl?|md|ndjson|npy|npz|orc|pdf|pickle|pkl|sqlite|tsv"
    r"|txt|xlsx?|xml|ya?ml|bz2|gz|xz|zip|zst)",
    re.IGNORECASE,
)


def _column(
    name: str, type_: pa.DataType, meaning: str, *, nullable: bool = False, unit: str = ""
) -> Column:
    return Column(name, type_, nullable, "deterministic", unit, meaning)


COLUMNS = (
    _column("prompt_id", pa.string(), "the row's id; the row index as text without one"),
    _column("prompt_index", pa.int64(), "index of the row in the input, from 0"),
    _column(
        "choice_index",
        pa.int32(),
        "index of the continuation in its row, from 0; with --from, sample_index",
    ),
    _column(
        "continuation",
        pa.string(),
        "the text that was scored; with --from, the completion",
        nullable=True,
    ),
    _column(
        "continuation_token_ids",
        pa.list_(pa.int32()),
        "its tokens, and the whitespace that ends the prompt; with --from, completion_token_ids; "
        "empty for an error",
    ),
    _column(
        "token_logprobs",
        pa.list_(pa.float32()),
        "log probability of each token, given all tokens before it; empty for an error",
        unit="nats",
    ),
    _column(
        "logprob",
        pa.float64(),
        "sum of token_logprobs; null for an error",
        nullable=True,
        unit="nats",
    ),
    _column(
        "is_greedy",
        pa.bool_(),
        "every token is the most likely one of its step, and the smallest id of tied ones; null "
        "for an error",
        nullable=True,
    ),
    _column("tokens", pa.int32(), "length of continuation_token_ids", unit="tokens"),
    _column("bytes", pa.int64(), "length of continuation in UTF-8", unit="bytes"),
    _column(
        "context_tokens_dropped",
        pa.int32(),
        "tokens cut off the front of the prompt, because the pair is longer than the context",
        unit="tokens",
    ),
    _column(
        "boundary_merged",
        pa.bool_(),
        "a token spans the end of the prompt, so that the tokens of prompt and continuation do not "
        "begin with those of the prompt",
    ),
    _column("error", pa.string(), "why there is no score; null when there is one", nullable=True),
)
SCHEMA = pa.schema([column.field for column in COLUMNS])


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCounts:
    """Counts of a table.

    Attributes:
        scores: Rows of the table.
        errors: Rows without a score.
        boundary_merged: Rows with boundary_merged.
        contexts_truncated: Rows whose prompt lost tokens.
        tokens: Tokens that were scored.
    """

    scores: int = 0
    errors: int = 0
    boundary_merged: int = 0
    contexts_truncated: int = 0
    tokens: int = 0

    def plus(self, table: pa.Table | pa.RecordBatch) -> TableCounts:
        """Return the counts with those of more rows."""
        return TableCounts(
            scores=self.scores + table.num_rows,
            errors=self.errors + table.num_rows - table["error"].null_count,
            boundary_merged=self.boundary_merged + _sum(table["boundary_merged"]),
            contexts_truncated=self.contexts_truncated
            + _sum(pc.greater(table["context_tokens_dropped"], 0)),
            tokens=self.tokens + _sum(table["tokens"]),
        )


class ScoreTable:
    """The file of a score run.

    Args:
        name: The path.
        overwrite: Replace an existing file.

    Attributes:
        path: The path.

    Raises:
        ConfigError: The path is in an object store, or its suffix is of another format.
        OutputConflictError: The path is a folder, in the output of a run, or another file.
    """

    def __init__(self, name: str, *, overwrite: bool) -> None:
        self._file, self._overwrite = SingleFile(name, command="score"), overwrite
        _check_suffix(name)
        self.path = self._file.path
        self._identity = self._read_identity() if self._file.exists() else None
        if self._file.exists() and self._identity is None and not overwrite:
            raise self._file.conflict("is another file")

    def holds(self, identity: dict[str, Any]) -> bool:
        """Return whether the file holds the scores of this job.

        Raises:
            OutputConflictError: It holds those of another job, which must not be overwritten.
        """
        if self._identity == identity:
            return True
        if self._identity is not None and not self._overwrite:
            assert isinstance(self._identity, dict)
            differing = [key for key in identity if self._identity.get(key) != identity[key]]
            what = f"{', '.join(differing)} differ{'s' * (len(differing) == 1)}"
            raise self._file.conflict(
                f"holds the scores of another job ({what if differing else 'its keys differ'})"
            )
        return False

    def counts(self) -> TableCounts:
        """Return the counts of the existing file."""
        counts = TableCounts()
        try:
            with pq.ParquetFile(self.path) as file:
                columns = ["error", "boundary_merged", "context_tokens_dropped", "tokens"]
                for batch in file.iter_batches(columns=columns):
                    counts = counts.plus(batch)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise StorageError(f"{self.path}: cannot be read ({error})") from error
        return counts

    def writer(self) -> AbstractContextManager[FileWriter]:
        """Return a writer of this file, under a lock; see `SingleFile.writer`."""
        return self._file.writer()

    def write(
        self, writer: FileWriter, facts: dict[str, Any], tables: Iterable[pa.Table]
    ) -> TableCounts:
        """Write the file.

        Args:
            writer: Of this file.
            facts: Facts of the run, for the metadata of the schema; `identity` among them.
            tables: The rows in order.

        Raises:
            StorageError: The file cannot be written, or reads back differently.
            OutputConflictError: Another process has written it.
        """
        schema = SCHEMA.with_metadata({FACTS_KEY: json.dumps({"format": FORMAT, **facts})})
        counts = TableCounts()

        def content(file: BinaryIO) -> None:
            nonlocal counts
            with pq.ParquetWriter(
                file, schema, compression="zstd", write_page_checksum=True
            ) as parquet:
                for table in tables:
                    counts = counts.plus(table)
                    parquet.write_table(table.cast(schema))

        def check(file: BinaryIO) -> None:
            rows = 0
            try:
                with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                    rows = sum(batch.num_rows for batch in parquet.iter_batches())
                problem = "" if rows == counts.scores else f"{rows} rows"
            except (ValueError, pa.ArrowException) as error:
                problem = str(error)
            if problem:
                raise StorageError(
                    f"{self.path}: reads back differently from what was written ({problem}); is "
                    "the disk failing?"
                )

        keep = not self._overwrite
        if not writer.write(self.path, content, check=check, only_if_absent=keep):
            raise self._file.conflict("was written by another process in the meantime")
        return counts

    def _read_identity(self) -> dict[str, Any] | None:
        """Return the identity in the file; None where it is no table of scores."""
        try:
            metadata = pq.read_schema(self.path).metadata or {}
            facts = json.loads(metadata[FACTS_KEY])
            return dict(facts["identity"]) if facts["format"] == FORMAT else None
        except (OSError, KeyError, TypeError, ValueError, RecursionError, pa.ArrowException):
            return None


def _check_suffix(name: str) -> None:
    suffix = PurePath(name).suffix
    if _OTHER_SUFFIX.fullmatch(suffix):
        raise ConfigError(
            f"{name}: score writes Parquet, and the suffix {suffix!r} is of another format; name a "
            "file such as scores.parquet, and convert it afterwards, as with read_parquet and "
            "to_csv of pandas",
            keys=("output",),
        )


def _sum(values: Any) -> int:
    return int(pc.sum(values).as_py() or 0)
