"""PartRunner: runs the prompts of parts from a PartSource through the engine, into a PartSink.

The loop belongs to the output, because the part is the unit of work: it is begun, committed,
recorded in the crash journal and generated again as a whole.

Rows are read across the borders of parts, so that the batch stays full. A part is committed when
its last row is done, by the thread of the sink, while the engine goes on. The number of parts in
flight is bounded, because finished rows wait in memory for their part.

Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import ConfigError, StoppedError
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.tokenize import TokenizedInput
from gptbatch.pipeline.model.loading import LoadedModel
from gptbatch.pipeline.output.error_limit import ErrorLimit
from gptbatch.pipeline.output.part_sink import PartSink
from gptbatch.pipeline.output.part_source import PartSource
from gptbatch.pipeline.output.row_runner import Progress, RowCounts, RowRunner, is_error
from gptbatch.pipeline.types import Completion, TokenizedPrompt

logger = logging.getLogger("gptbatch")

# Parts in flight besides those that the rows held by the engine can span.
MAX_EXTRA_PARTS_IN_FLIGHT = 8


class Stop(Protocol):
    """A source of requests to stop a run."""

    def deferred(self) -> AbstractContextManager[None]:
        """Defer a request inside the context until `requested` is called.

        Outside, a request may raise at any time.
        """

    def requested(self) -> str | None:
        """Return the source of a request ("SIGTERM"); None for none. Called at every step."""


@dataclass(kw_only=True)
class PartRunner:
    """Runs parts through the engine and into a sink.

    Attributes:
        config: The settings of the job.
        prompts: The input as token ids.
        summary: The result of checking the input.
        loaded: The model.
        sink: Takes the rows.
        observers: Take the counts after every step.
        stop: Is queried after every step.
        source: Deals out the parts.
    """

    config: JobConfig
    prompts: TokenizedInput
    summary: InputSummary
    loaded: LoadedModel
    sink: PartSink
    observers: Sequence[Progress]
    stop: Stop
    source: PartSource

    def __post_init__(self) -> None:
        self._rows = RowRunner(self.config, self.prompts, self.summary, self.loaded, self.observers)
        self._limit = ErrorLimit(self.config.max_row_errors, self.summary.rows)
        self._rows_kept = sum(part.rows for part in self.sink.parts.values())
        self._errors_kept = sum(part.errors for part in self.sink.parts.values())
        self._pulled: set[int] = set()
        self._suspect_parts: list[int] = []

    @property
    def counts(self) -> RowCounts:
        """What this run has finished."""
        return self._rows.counts

    def run(self) -> None:
        """Generate and commit the parts of the source.

        Parts that were in flight at two crashes run last, one row at a time.

        Raises:
            StoppedError: A stop was requested.
            InputRowsError: There are more error rows than max_row_errors.
            ConfigError: The source deals out a part that the job does not have.
        """
        try:
            self._run()
        except BaseException:
            self._take_rest()
            raise
        finally:
            self.sink.close()
            for number in sorted(self._pulled - self.sink.parts.keys()):
                self.source.given_up(number)

    def _run(self) -> None:
        self._rows.begin(self.sink.rows_total, self._rows_kept)
        try:
            # A source may have parts again, once all that it dealt are written.
            while self._run_parts(self._pull()):
                pass
            if self._suspect_parts:
                self._warn_of_suspects(self._suspect_parts)
                self._run_parts(iter(self._suspect_parts), batch_size=1)
            self._rows.complete()
        finally:
            self._rows.end()

    def _pull(self) -> Iterator[int]:
        """Yield the parts of the source. Put those aside that were in flight at two crashes."""
        n_parts = len(self.summary.part_digests)
        while (number := self.source.next()) is not None:
            if not 0 <= number < n_parts:
                raise ConfigError(
                    f"there is no part {number}; the job has parts 0 to {n_parts - 1}"
                )
            self._pulled.add(number)
            self.sink.reserve(number)
            if number in self.sink.suspect_parts:
                self._suspect_parts.append(number)
            else:
                yield number

    def _warn_of_suspects(self, numbers: Sequence[int]) -> None:
        last = self.sink.last_prompt_id
        logger.warning(
            "two runs crashed while parts %s were in flight%s; their rows run one at a time",
            ", ".join(map(str, sorted(numbers))),
            f" (the last one while row {last!r} ran alone; --skip-row leaves it out)"
            if last is not None
            else "",
        )

    def _run_parts(self, numbers: Iterator[int], *, batch_size: int | None = None) -> bool:
        """Generate and commit parts. Returns whether there were any."""
        first = next(numbers, None)
        if first is None:
            return False
        engine = self._rows.engine(batch_size)
        max_in_flight = max_parts_in_flight(engine.max_rows_held, self.summary.part_rows)

        def try_begin_part(number: int) -> bool:
            if self.sink.is_in_flight(number):
                return True
            if self.sink.n_in_flight >= max_in_flight:
                return False
            self.sink.begin_part(number)
            return True

        prompts = self.prompts.prompts(
            self.summary,
            reject=self._take,
            parts=chain([first], numbers),
            try_begin_part=try_begin_part,
        )
        if batch_size == 1:
            prompts = self._record_lone_rows(prompts)
        rows = self.sink.rows_total - self._rows_kept - self.counts.rows
        for _ in self._rows.steps(engine, prompts, self._take, rows=rows):
            source = self.stop.requested()
            if source is not None:
                # A slow disk may outlast the time that a stop has. That is not a crash either.
                self.sink.close_journal()
            self._take_written(wait=source is not None)
            if source is not None:
                raise StoppedError(
                    f"stopped by {source}; {self._described_progress()}; run the same command "
                    "again to go on"
                )
        self._take_written(wait=True)
        return True

    def _described_progress(self) -> str:
        """Return what is written, and what a stop costs."""
        count = len(self.sink.parts)
        written = f"{count} part{' is' if count == 1 else 's are'} written"
        new = sum(part.rows for part in self.sink.parts.values()) - self._rows_kept
        lost = self.counts.rows - new
        if not lost:
            return written
        return (
            f"{written}, and {lost} finished row{'s' * (lost != 1)} of other parts will be "
            "generated again (smaller part_rows, for a new output: fewer)"
        )

    def _record_lone_rows(
        self, prompts: Iterator[TokenizedPrompt | None]
    ) -> Iterator[TokenizedPrompt | None]:
        """Record each row in the crash journal before it runs alone."""
        for prompt in prompts:
            if prompt is not None:
                # A crash is blamed on the row, so nothing is written beside it.
                self._take_written(wait=True)
                self.sink.record_lone_row(prompt.prompt.prompt_id)
            yield prompt

    def _take(self, completion: Completion) -> None:
        """Take one sample. Pass a row of the input on when all of its samples are there."""
        samples = self._rows.add(completion)
        if samples is None:
            return
        self.sink.add(samples)
        if is_error(samples):
            self._limit.check(self._errors_kept + self.counts.errors)

    def _take_written(self, *, wait: bool = False) -> None:
        """Tell the source which parts are written; see `PartSink.written`."""
        for part in self.sink.written(wait=wait):
            self.source.committed(part)

    def _take_rest(self) -> None:
        """Take the parts that are complete when a run fails. Further errors are only logged."""
        while self.sink.n_unwritten:
            try:
                self._take_written(wait=True)
            except Exception as error:  # noqa: BLE001 - the thread may raise what the loop may
                logger.warning("%s", error)


def max_parts_in_flight(max_rows_held: int, part_rows: int) -> int:
    """Return the most parts that are in flight at once.

    Args:
        max_rows_held: The most sequences that the engine holds.
        part_rows: Rows per part.
    """
    return MAX_EXTRA_PARTS_IN_FLIGHT + -(-max_rows_held // part_rows)
