"""The pilot: rows of a job run for some seconds on its engine, to measure steps and lengths."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from gptbatch.pipeline.engine.engine import Engine, EngineStats
from gptbatch.pipeline.estimate.lengths import Observation
from gptbatch.pipeline.estimate.step_cost import WORK, Array
from gptbatch.pipeline.input.tokenizer import PromptTokenizer
from gptbatch.pipeline.output.part_writer import write_table
from gptbatch.pipeline.output.schema import content_digest, to_table
from gptbatch.pipeline.types import ENDING_STOP_REASONS, Completion, Sample, TokenizedPrompt

# The last steps of a run have fewer rows. A part of the pilot measures how fast they are.
SMALL_BATCH_SHARE, SMALL_BATCH_DIVISOR = 0.2, 4
# Memory is taken and kernels are prepared in the first steps.
WARM_UP_STEPS = 2
# Long prompts fill the time with prefill. The pilot then goes on until this many steps have decoded
# more tokens than they prefilled, for at most MAX_EXTENSION times its time.
MIN_DECODE_STEPS, MAX_EXTENSION = 20, 3
# Rows are written for their size and time.
MAX_WRITTEN_ROWS = 512
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pilot:
    """Measurements of the pilot.

    Attributes:
        batch_size: The most rows that ran at once, as far as memory allowed.
        work: (steps, len(WORK)): the work of each step.
        seconds: (steps,): its time.
        segments: The steps at the batch size of the run, and those of the small batch.
        observed: The new tokens of each row of the first segment.
        written: What writing its rows takes.
    """

    batch_size: int
    work: Array
    seconds: Array
    segments: list[range]
    observed: list[Observation]
    written: WrittenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRows:
    """What writing takes, per prompt and new token.

    Attributes:
        bytes_per_file: Bytes of a Parquet file besides its tokens.
        file_bytes: Bytes in a Parquet file.
        memory_bytes: Bytes of rows that wait for their part.
        seconds: Seconds of decoding and writing them.
    """

    bytes_per_file: float
    file_bytes: float
    memory_bytes: float
    seconds: float


def run_pilot(
    new_engine: Callable[[int], Engine],
    prompts: Sequence[TokenizedPrompt],
    batch_size: int,
    seconds: float,
    tokenizer: PromptTokenizer,
) -> Pilot:
    """Run rows until the time is over or all are finished.

    Args:
        new_engine: Returns an engine for a batch size. No rows wait in it, so that they start in
            the given order.
        prompts: The rows.
        batch_size: That of the run.
        seconds: Time for all steps; more with long prompts.
        tokenizer: Decodes completions.
    """
    ordered = spread(prompts)
    small = max(1, batch_size // SMALL_BATCH_DIVISOR)
    share = 0.0 if small == batch_size else SMALL_BATCH_SHARE
    main = _Segment(new_engine(batch_size), ordered, seconds * (1 - share))
    segments = [main]
    if share and not main.finished:
        segments.append(_Segment(new_engine(small), ordered, seconds * share))
    bounds = np.cumsum([0, *(len(segment.seconds) for segment in segments)]).tolist()
    return Pilot(
        batch_size=main.batch_size,
        work=np.array([work for segment in segments for work in segment.work]),
        seconds=np.array([second for segment in segments for second in segment.seconds]),
        segments=[range(*bound) for bound in pairwise(bounds)],
        observed=[
            Observation(len(row.token_ids), row.stop_reason in ENDING_STOP_REASONS)
            for row in main.rows
            if row.error is None
        ],
        written=_write(main.rows[:MAX_WRITTEN_ROWS], tokenizer),
    )


def spread(prompts: Sequence[TokenizedPrompt]) -> list[TokenizedPrompt]:
    """Order prompts such that the first k, for every k, have lengths like those of all.

    Sorts by prompt tokens and max_new_tokens, and goes through the result in steps of the golden
    ratio.
    """
    by_length = sorted(
        prompts, key=lambda prompt: (len(prompt.token_ids), prompt.prompt.params.max_new_tokens)
    )
    order = np.argsort(np.arange(1, len(by_length) + 1) * GOLDEN_RATIO % 1)
    return [by_length[index] for index in np.argsort(order)]


class _Segment:
    """Runs rows for some seconds.

    Attributes:
        batch_size: The most rows that ran at once.
        work: The work of each step, after the first few.
        seconds: Its time.
        rows: The completions, cut off where the time was over.
        finished: Whether all rows were finished.
    """

    def __init__(self, engine: Engine, prompts: Sequence[TokenizedPrompt], seconds: float) -> None:
        self.work: list[list[int]] = []
        self.seconds: list[float] = []
        self.rows: list[Completion] = []
        began_s = step_began_s = time.perf_counter()
        before, steps = _work(engine.stats), engine.generate(iter(prompts))
        self.finished = False
        n_decode_steps, elapsed_s = 0, 0.0
        while elapsed_s < seconds or (
            n_decode_steps < MIN_DECODE_STEPS and elapsed_s < MAX_EXTENSION * seconds
        ):
            completions = next(steps, None)
            if completions is None:
                self.finished = True
                break
            now_s, done = time.perf_counter(), _work(engine.stats)
            self.work.append([new - old for new, old in zip(done, before, strict=True)])
            self.seconds.append(now_s - step_began_s)
            step_began_s, before, elapsed_s = now_s, done, now_s - began_s
            self.rows += completions
            _, decoded, _, prefilled = self.work[-1]
            n_decode_steps += decoded >= prefilled
        self.rows += engine.unfinished()
        self.batch_size = engine.batch_size
        if len(self.work) > 2 * WARM_UP_STEPS:
            del self.work[:WARM_UP_STEPS], self.seconds[:WARM_UP_STEPS]


def _work(stats: EngineStats) -> list[int]:
    return [getattr(stats, name) for name in WORK]


def _write(completions: Sequence[Completion], tokenizer: PromptTokenizer) -> WrittenRows:
    """Write completions to memory as a part is written."""
    began_s = time.perf_counter()
    table = to_table([Sample(row, tokenizer.text_of(row)) for row in completions])
    whole_bytes = _file_bytes(table)
    content_digest(table)
    seconds = time.perf_counter() - began_s
    tokens = [len(row.prompt_token_ids) + len(row.token_ids) for row in completions]
    # A file has a part that does not grow with its rows.
    half = len(tokens) // 2
    half_bytes = _file_bytes(table[:half])
    file_bytes = (whole_bytes - half_bytes) / max(1, sum(tokens[half:]))
    return WrittenRows(
        bytes_per_file=max(0.0, whole_bytes - file_bytes * sum(tokens)),
        file_bytes=file_bytes,
        memory_bytes=sum(map(_size, completions)) / max(1, sum(tokens)),
        seconds=seconds / max(1, sum(tokens)),
    )


def _file_bytes(table: pa.Table) -> int:
    file = io.BytesIO()
    write_table(file, table)
    return file.tell()


def _size(value: Any) -> int:
    """Return the bytes of a value in memory, with what it holds."""
    size = sys.getsizeof(value)
    if is_dataclass(value):
        return size + sum(_size(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, (list, tuple)):
        return size + sum(map(_size, value))
    return size
