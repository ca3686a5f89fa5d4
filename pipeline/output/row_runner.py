"""RowRunner: runs prompts through the engine, and collects the samples of each row.

It serves the runs of parts (`PartRunner`) and tables in memory (`in_memory.py`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.tokenize import TokenizedInput
from gptbatch.pipeline.model.loading import LoadedModel
from gptbatch.pipeline.output.time_left import TimeLeft
from gptbatch.pipeline.types import Completion, TokenizedPrompt

if TYPE_CHECKING:
    from gptbatch.pipeline.engine.engine import Engine, SchedulingOptions


class Progress(Protocol):
    """An observer of a run. Its methods are called often and must return quickly."""

    def begin(self, total_rows: int, done_rows: int) -> None:
        """Start.

        Args:
            total_rows: Rows of the output, or of the run's shard.
            done_rows: Rows among them that earlier runs have done.
        """

    def update(
        self, *, rows: int, errors: int, completion_tokens: int, remaining_s: float | None
    ) -> None:
        """Take the counts since `begin`, and the seconds that are left; None if unknown."""

    def end(self) -> None:
        """Finish."""


@dataclass(slots=True)
class RowCounts:
    """Counts of the rows that a run has finished.

    Attributes:
        rows: Rows of the input, with all of their samples.
        samples: Rows of the table.
        errors: Rows of the input with an error.
        prompt_tokens: Sum over the samples.
        completion_tokens: Sum over the samples.
        batch_size_halvings: How often memory ran out.
    """

    rows: int = 0
    samples: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    batch_size_halvings: int = 0


class RowRunner:
    """Runs prompts through the engine.

    Args:
        config: The settings of the job.
        prompts: The input as token ids.
        summary: The result of checking the input.
        loaded: The model.
        observers: Take the counts after every step.

    Attributes:
        counts: What has been finished.
    """

    def __init__(
        self,
        config: JobConfig,
        prompts: TokenizedInput,
        summary: InputSummary,
        loaded: LoadedModel,
        observers: Sequence[Progress],
    ) -> None:
        self._config, self._prompts, self._summary = config, prompts, summary
        self._loaded, self._observers = loaded, observers
        self.counts = RowCounts()
        # Samples of rows that lack some, by index of the row.
        self._samples: dict[int, list[Completion]] = {}
        self._time_left = TimeLeft(0)

    def begin(self, total_rows: int, done_rows: int) -> None:
        """Tell the observers that the run begins; see Progress."""
        for observer in self._observers:
            observer.begin(total_rows, done_rows)

    def complete(self) -> None:
        """Tell the observers the final counts: all rows are done and written."""
        self._update(self.counts.completion_tokens, 0.0)

    def end(self) -> None:
        """Tell the observers that the run has ended, and log the warnings about prompts."""
        for observer in self._observers:
            observer.end()
        self._prompts.log_warnings()

    def engine(self, batch_size: int | None = None) -> Engine:
        """Return a new engine; None takes the batch size of the config."""
        batch_size = batch_size or self._loaded.batch_size(self._config.engine.batch_size)
        samples = self._summary.rows * self._summary.max_n
        return make_engine(
            self._config, self._prompts, self._loaded, max(1, min(batch_size, samples))
        )

    def steps(
        self,
        engine: Engine,
        prompts: Iterator[TokenizedPrompt | None],
        take: Callable[[Completion], object],
        *,
        rows: int,
    ) -> Iterator[None]:
        """Run prompts, and yield after every step of the engine.

        Args:
            engine: From `engine`.
            prompts: The prompts; None as in `Engine.generate`.
            take: Takes each completion.
            rows: Rows of the input among the prompts, for the time that is left.
        """
        counts = self.counts
        self._time_left = TimeLeft(rows)
        tokens_before, halvings_before = counts.completion_tokens, counts.batch_size_halvings
        for completions in engine.generate(self._counted(prompts)):
            for completion in completions:
                take(completion)
            counts.batch_size_halvings = halvings_before + engine.stats.halvings
            self._update(
                tokens_before + engine.stats.new_tokens, self._time_left.seconds(engine.stats)
            )
            yield

    def add(self, completion: Completion) -> list[Completion] | None:
        """Count one sample.

        Returns:
            All samples of its row in order, if this is the last of them to arrive.
        """
        prompt, counts = completion.prompt, self.counts
        counts.prompt_tokens += completion.prompt_tokens
        counts.completion_tokens += len(completion.token_ids)
        self._time_left.finished(completion)
        samples = self._samples.pop(prompt.index, [])
        samples.append(completion)
        if len(samples) < prompt.params.n:
            self._samples[prompt.index] = samples
            return None
        samples.sort(key=lambda sample: sample.prompt.sample_index)
        counts.rows += 1
        counts.samples += len(samples)
        counts.errors += is_error(samples)
        return samples

    def _update(self, completion_tokens: int, remaining_s: float | None) -> None:
        for observer in self._observers:
            observer.update(
                rows=self.counts.rows,
                errors=self.counts.errors,
                completion_tokens=completion_tokens,
                remaining_s=remaining_s,
            )

    def _counted(
        self, prompts: Iterator[TokenizedPrompt | None]
    ) -> Iterator[TokenizedPrompt | None]:
        """Count the tokens of each prompt for the time that is left."""
        for prompt in prompts:
            if prompt is not None:
                self._time_left.read(prompt, self._prompts.new_token_limit(prompt))
            yield prompt


def make_engine(
    config: JobConfig,
    prompts: TokenizedInput,
    loaded: LoadedModel,
    batch_size: int,
    scheduling: SchedulingOptions | None = None,
) -> Engine:
    """Return the engine of a job.

    Args:
        config: The settings of the job.
        prompts: Its input.
        loaded: Its model.
        batch_size: The most sequences that run at once.
        scheduling: How steps are filled; None is as in a run.
    """
    from gptbatch.pipeline.engine.engine import SchedulingOptions
    from gptbatch.pipeline.engine.selection import new_engine

    return new_engine(
        loaded.model,
        batch_size=batch_size,
        eos_token_ids=() if config.ignore_eos else prompts.special_tokens.eos_token_ids,
        memory_bytes=loaded.cache_memory_bytes(config.engine.memory_gib),
        window_full=config.window_full,
        scheduling=scheduling or SchedulingOptions(),
        record_logits=config.record_logits_digest,
        token_bytes=prompts.token_bytes,
    )


def is_error(samples: Sequence[Completion]) -> bool:
    """Return whether a row has an error, in any of its samples."""
    return any(sample.error is not None for sample in samples)
