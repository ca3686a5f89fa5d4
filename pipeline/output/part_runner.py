"""The parts of a job that are to be done, through the engine and into files, one after the other or beside each other.

Rows are drawn across the borders of parts, so that slots stay full; a part is committed when its last row is there. The number of
parts that are under way is bounded: what has ended waits in memory for its part.
Imports no torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import InputRowsError, StoppedError
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.tokenize import TokenizedInput
from gptbatch.pipeline.model.loading import LoadedModel
from gptbatch.pipeline.output.crash_journal import CrashJournal
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.parts import PartWriter
from gptbatch.pipeline.output.progress_file import ProgressFile
from gptbatch.pipeline.types import Completion

if TYPE_CHECKING:
    from gptbatch.pipeline.engine.engine import Engine

logger = logging.getLogger("gptbatch")

MAX_OPEN_PARTS = 8  # besides those that the slots can reach into: rows that are done wait in memory until their part is whole
MANIFEST_INTERVAL_S = 5.0


class Progress(Protocol):
    """Who watches a run. Called often: must be quick."""

    def begin(self, total_rows: int, done_rows: int) -> None:
        """total_rows: of the output. done_rows: those of them that earlier runs have done."""

    def update(self, *, rows: int, errors: int, completion_tokens: int) -> None:
        """All counts are since `begin`."""

    def end(self) -> None: ...


class Stop(Protocol):
    """Who may ask a run to stop."""

    def deferred(self) -> AbstractContextManager[None]:
        """Inside, a wish to stop is kept until it is asked for; outside, it may end the run wherever it is."""

    def requested(self) -> str | None:
        """Who wants the run to stop ("SIGTERM"); None for nobody. Asked at every step."""


@dataclass(frozen=True, slots=True)
class ErrorLimit:
    """How many error rows a run may have. setting: max_row_errors, "5" or "2.5%" of `rows`, None for any number."""

    setting: str | None
    rows: int

    @property
    def most(self) -> int:
        if self.setting is None:
            return self.rows
        return (
            int(float(self.setting[:-1]) / 100 * self.rows)
            if self.setting.endswith("%")
            else int(self.setting)
        )

    def check(self, errors: int) -> None:
        """Raises InputRowsError when there are more."""
        if errors > self.most:
            raise InputRowsError(
                f"{errors} of {self.rows} rows are errors, more than max_row_errors ({self.setting}) allows; "
                "what is written stays, and the same command with a larger one goes on"
            )


@dataclass(kw_only=True)
class PartRunner:
    """Runs parts through the engine and commits them as they become whole.

    parts: those that are written, by number; grows. limit: on error rows, errors_before of which earlier runs left. journal: None where
    nobody may keep such a record. rows, errors and tokens count what this loop has finished.
    """

    config: JobConfig
    prompts: TokenizedInput
    summary: InputSummary
    loaded: LoadedModel
    folder: OutputFolder
    memory: FileHashes
    writer: PartWriter
    parts: dict[int, Part]
    limit: ErrorLimit
    errors_before: int
    journal: CrashJournal | None
    watch: ProgressFile
    progress: Progress | None
    stop: Stop
    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    halvings: int = 0

    def __post_init__(self) -> None:
        self._started: set[int] = (
            set()
        )  # parts of which a row has been taken and that are not written
        self._manifest_written = time.monotonic()

    def run(self, numbers: list[int]) -> None:
        summary = self.summary
        if summary.rows == 0:
            self._written(self.writer.add_empty())
            return
        suspect_parts = self.journal.suspect_parts & set(numbers) if self.journal else set()
        if self.progress is not None:
            self.progress.begin(summary.rows, sum(part.rows for part in self.parts.values()))
        self.watch.begin()
        try:
            if suspect_parts:
                logger.warning(
                    "runs have died twice while parts %s were in flight%s: they run one row at a time",
                    ", ".join(map(str, sorted(suspect_parts))),
                    f" (the last one while row {self.journal.last_prompt_id!r} ran alone; --skip-row leaves it out)"
                    if self.journal and self.journal.last_prompt_id is not None
                    else "",
                )
                self._run_parts(suspect_parts, batch_size=1)
            if others := set(numbers) - suspect_parts:
                self._run_parts(
                    others, batch_size=self.loaded.batch_size(self.config.engine.batch_size)
                )
        finally:
            if self.progress is not None:
                self.progress.end()
            self.prompts.log_warnings()

    def _run_parts(self, numbers: set[int], *, batch_size: int) -> None:
        engine = self._engine(batch_size)
        self._most_started = MAX_OPEN_PARTS + -(-engine.max_rows_held // self.summary.part_rows)
        prompts = self.prompts.prompts(
            self.summary, reject=self._take, parts=numbers, may_start=self._may_start
        )
        if batch_size == 1 and self.journal is not None:
            prompts = self._named(prompts, self.journal)
        tokens_before, halvings_before = self.completion_tokens, self.halvings
        for ended in engine.generate(prompts):
            for completion in ended:
                self._take(completion)
            tokens = tokens_before + engine.stats.new_tokens
            if self.progress is not None:
                self.progress.update(rows=self.rows, errors=self.errors, completion_tokens=tokens)
            self.watch.update(rows=self.rows, errors=self.errors, completion_tokens=tokens)
            self.halvings = halvings_before + engine.stats.halvings
            if (who := self.stop.requested()) is not None:
                raise StoppedError(
                    f"stopped by {who}; {len(self.parts)} parts are written; run the same command again to go on"
                )

    def _named(self, prompts: Iterator[Any], journal: CrashJournal) -> Iterator[Any]:
        """Notes the row that runs alone before it does."""
        for prompt in prompts:
            if prompt is not None:
                journal.note(sorted(self._started), prompt.prompt.prompt_id)
            yield prompt

    def _may_start(self, number: int) -> bool:
        if number not in self._started:
            if len(self._started) >= self._most_started:
                return False
            self._started.add(number)
            self._note()
        return True

    def _note(self) -> None:
        if self.journal is not None:
            self.journal.note(sorted(self._started))

    def _take(self, completion: Completion) -> None:
        failed = completion.finish_reason == "error"
        self.rows += 1
        self.errors += failed
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += len(completion.token_ids)
        text = None
        if not failed:
            tokenizer = self.prompts.tokenizer
            text = tokenizer.completion_text(
                completion.prompt_token_ids, completion.token_ids, completion.finish_reason
            )
        if (part := self.writer.add(completion, text)) is not None:
            self._written(part)
        if failed:
            self.limit.check(self.errors_before + self.errors)

    def _written(self, part: Part) -> None:
        self.parts[part.number] = part
        self._started.discard(part.number)
        if self.journal is not None:
            self.journal.written(part.number)
            self._note()
        if time.monotonic() - self._manifest_written >= MANIFEST_INTERVAL_S:
            self.folder.write_manifest(self.writer.facts, self.parts.values(), complete=False)
            self.folder.remember(self.memory)
            self._manifest_written = time.monotonic()

    def _engine(self, batch_size: int) -> Engine:
        from gptbatch.pipeline.engine.engine import Engine

        config, rows = self.config, self.summary.rows
        return Engine(
            model=self.loaded.model,
            batch_size=max(1, min(batch_size, rows)),
            end_tokens=() if config.ignore_eos else self.prompts.special_tokens.ends,
            memory_bytes=self.loaded.cache_memory_bytes(config.engine.memory_gib),
            window_full=config.window_full,
            record_logits=config.record_logits_digest,
        )
