"""Scores an input, or the completions of a finished run: from rows to one Parquet file.

    1. find    the checkpoint and the tokenizer, and the file to write (exit codes 66, 78)
    2. check   every row of the input (65)
    3. load    the model, and check its batch invariance (78)
    4. score   rows -> pairs of token ids -> log probabilities -> the file

Heavy libraries are imported where they are used.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gptbatch.pipeline.audit.loaded_run import LoadedRun
from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import ConfigError, OutputConflictError
from gptbatch.pipeline.input.config_hash import special_token_identity, start_token
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.loading import LoadedModel, load_model, resolve_device
from gptbatch.pipeline.output.placement import check_placement
from gptbatch.pipeline.output.row_runner import Progress
from gptbatch.pipeline.output.time_left import seconds_left_by_rows
from gptbatch.pipeline.score.items import (
    ScoreItem,
    input_windows,
    recorded_windows,
    score_table,
    token_pairs,
)
from gptbatch.pipeline.score.pairs import PairEncoder
from gptbatch.pipeline.score.rows import ScoreFields, ScoreReader
from gptbatch.pipeline.score.scoring import score_windows
from gptbatch.pipeline.score.table import ScoreTable, TableCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """The result of a score run.

    Attributes:
        output: The file.
        rows: Rows of the input, or of that of the run.
        scores: Rows of the table: one per continuation.
        errors: Rows of the table without a score.
        boundary_merged: Rows of the table with boundary_merged.
        contexts_truncated: Rows of the table whose prompt lost tokens.
        tokens: Tokens that were scored.
        up_to_date: The file held these scores already. No model was loaded.
        tokens_per_s: tokens / score_s.
        device: "cpu" or "cuda"; None without a model, as the next three.
        dtype: Type of the weights.
        batch_invariance: Result of the self-test.
        load_s: Seconds for loading the model.
        score_s: Seconds for scoring and writing.
        wall_s: Seconds in all.
    """

    output: str
    rows: int
    scores: int
    errors: int
    boundary_merged: int
    contexts_truncated: int
    tokens: int
    up_to_date: bool
    tokens_per_s: float
    device: str | None
    dtype: str | None
    batch_invariance: str | None
    load_s: float
    score_s: float
    wall_s: float


def score_input(
    config: JobConfig,
    fields: ScoreFields | None = None,
    progress: Progress | None = None,
) -> ScoreSummary:
    """Score the continuations of an input.

    Args:
        config: Names the model, the input and the file to write (`output`). Sampling settings and
            parts have no meaning.
        fields: The fields of the continuations.
        progress: Takes the counts.

    Raises:
        GptbatchError: See errors.py for the kinds.
    """
    began_s = time.monotonic()
    fields = fields or ScoreFields()
    if config.skip_row or config.on_bad_row != "fail":
        key = "skip_row" if config.skip_row else "on_bad_row"
        raise ConfigError(f"{key}: score scores every row; remove it", keys=(key,))
    if config.messages_field is not None:
        raise ConfigError(
            "messages_field: score takes prompts and no messages; remove it, or write the prompt "
            "with prompt_template",
            keys=("messages_field",),
        )
    check_placement(config)
    table = ScoreTable(config.output, overwrite=config.overwrite)
    checkpoint = find_checkpoint(
        config.model, revision=config.revision, allow_pickle=config.allow_pickle
    )
    gpt_config = parse_config(checkpoint.config, str(checkpoint.config_path))
    tokenizer = load_tokenizer(checkpoint.folder)
    reader = ScoreReader(config, fields)
    _refuse_input_as_output(config, reader, table.path)
    checked = reader.check()
    identity = {
        "model_digest": checkpoint.model_digest,
        "tokenizer_digest": tokenizer.digest,
        **special_token_identity(config, checkpoint, tokenizer),
        "dtype": config.engine.dtype,
        "cache_dtype": config.engine.cache_dtype,
        "parse_special": config.parse_special,
        "add_special_tokens": config.add_special_tokens,
        "on_lost_text": config.on_lost_text,
        "input_digest": checked.digest,
    }
    if table.holds(identity):
        return _up_to_date(table, checked.rows, began_s)
    encoder = PairEncoder(
        tokenizer,
        start_token=start_token(checkpoint.special_tokens, tokenizer),
        parse_special=config.parse_special,
        add_special_tokens=config.add_special_tokens,
        on_lost_text=config.on_lost_text,
    )
    device = resolve_device(config.engine)
    with table.writer() as writer:
        load_began_s = time.monotonic()
        loaded = load_model(
            checkpoint,
            gpt_config,
            config.engine,
            device,
            batch_invariance=config.batch_invariance,
        )
        run = _ScoreRun(loaded, config.engine.dtype, checked.rows, progress)
        load_s = time.monotonic() - load_began_s
        windows = input_windows(reader.rows(checked), encoder, gpt_config)
        counts = table.write(writer, run.facts(identity), run.tables(windows))
        return run.summary(table.path, counts, load_s, began_s)


def score_run(
    loaded_run: LoadedRun,
    output: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ScoreSummary:
    """Score the recorded completions of a run: its tokens, without encoding their text again.

    Args:
        loaded_run: The run.
        output: The file to write.
        overwrite: Replace an existing file.
        progress: Takes the counts.

    Raises:
        GptbatchError: See errors.py for the kinds.
    """
    began_s = time.monotonic()
    table = ScoreTable(output, overwrite=overwrite)
    run = loaded_run.run
    recorded = run.manifest["identity"]
    identity = {
        "config_hash": recorded.get("config_hash"),
        "input_digest": recorded.get("input_digest"),
        "model_digest": loaded_run.checkpoint.model_digest,
        "rows": run.n_rows,
        "content_digest": run.content_digest,
    }
    if table.holds(identity):
        return _up_to_date(table, run.rows_done, began_s)
    with table.writer() as writer:
        load_began_s = time.monotonic()
        loaded = loaded_run.loaded
        scoring = _ScoreRun(loaded, loaded_run.config.engine.dtype, run.rows_done, progress)
        load_s = time.monotonic() - load_began_s
        windows = recorded_windows(loaded_run)
        counts = table.write(writer, scoring.facts(identity), scoring.tables(windows))
        return scoring.summary(table.path, counts, load_s, began_s)


class _ScoreRun:
    """Scores windows of items with a loaded model."""

    def __init__(
        self, loaded: LoadedModel, dtype: str, rows: int, progress: Progress | None
    ) -> None:
        self._loaded, self._dtype, self._rows = loaded, dtype, rows
        self._progress = progress
        self._began_s = time.monotonic()

    def facts(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return what the file records about the run. Equal runs record equal facts."""
        return {
            "identity": identity,
            "environment": self._loaded.environment,
            "batch_invariance": self._loaded.batch_invariance,
        }

    def tables(self, windows: Iterable[list[ScoreItem]]) -> Iterator[pa.Table]:
        """Yield the scored rows, a table per window."""
        self._began_s = time.monotonic()
        if self._progress is not None:
            self._progress.begin(self._rows, 0)
        counts, last_index, n_rows = TableCounts(), -1, 0
        scored = score_windows(
            self._loaded.model, ((items, token_pairs(items)) for items in windows)
        )
        for items, scores in scored:
            table = score_table(items, scores)
            yield table
            counts = counts.plus(table)
            # a row may continue in the next window
            n_rows += len({item.prompt_index for item in items} - {last_index})
            last_index = items[-1].prompt_index
            if self._progress is not None:
                self._progress.update(
                    rows=n_rows,
                    errors=counts.errors,
                    completion_tokens=counts.tokens,
                    remaining_s=seconds_left_by_rows(
                        time.monotonic() - self._began_s, n_rows, self._rows - n_rows
                    ),
                )
        if self._progress is not None:
            self._progress.end()

    def summary(
        self, path: Path, counts: TableCounts, load_s: float, began_s: float
    ) -> ScoreSummary:
        now = time.monotonic()
        score_s = now - self._began_s
        return ScoreSummary(
            output=str(path),
            rows=self._rows,
            **asdict(counts),
            up_to_date=False,
            tokens_per_s=round(counts.tokens / score_s, 1) if score_s > 0 else 0.0,
            device=self._loaded.model.device.type,
            dtype=self._dtype,
            batch_invariance=self._loaded.batch_invariance,
            load_s=round(load_s, 3),
            score_s=round(score_s, 3),
            wall_s=round(now - began_s, 3),
        )


def _up_to_date(table: ScoreTable, rows: int, began_s: float) -> ScoreSummary:
    return ScoreSummary(
        output=str(table.path),
        rows=rows,
        **asdict(table.counts()),
        up_to_date=True,
        tokens_per_s=0.0,
        device=None,
        dtype=None,
        batch_invariance=None,
        load_s=0.0,
        score_s=0.0,
        wall_s=round(time.monotonic() - began_s, 3),
    )


def _refuse_input_as_output(config: JobConfig, reader: ScoreReader, path: Path) -> None:
    """Raise OutputConflictError if the file to write is, or will be, a file of the input."""
    names = [*config.inputs, *([] if config.dataset is None else [config.dataset])]
    files = [file for file in reader.files() or () if isinstance(file, Path)]
    is_read = path.exists() and any(
        file.exists() and path.samefile(file) for file in (*files, *map(Path, names))
    )
    if is_read or any(fnmatch.fnmatch(str(path), name) for name in names):
        raise OutputConflictError(
            f"{path}: is a file of the input of this run; name another output"
        )
