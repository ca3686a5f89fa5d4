"""The rows that a run has left to generate: their tokens, counted, and a sample of the prompts.

Imports no torch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.tokenize import TokenizedInput, samples_of
from gptbatch.pipeline.output.part_plan import rows_of_part
from gptbatch.pipeline.types import Completion, TokenizedPrompt

# Of an input of twice this many rows or more, about this many are sampled, and fewer than twice as
# many, in stretches of consecutive ones. Of a smaller input, all are.
SAMPLED_ROWS, ROWS_PER_STRETCH = 4096, 512
REPORT_INTERVAL_S = 5.0


@dataclass(kw_only=True)
class Workload:
    """Rows to generate.

    Attributes:
        n_rows: Rows of the input that reach the engine.
        n_samples: Their samples: rows of the table.
        prompt_tokens: Prompt tokens of the samples.
        max_new_tokens: The most new tokens of the samples.
        prompt_lengths: Prompt tokens of a row -> number of rows.
        error_kinds: Number of rows that become errors before the model runs, by kind.
        truncated: Rows whose prompts lose tokens at the front.
        sampled: The samples of rows in input order: of all, or of stretches of a large input.
        read_s: Seconds of reading and tokenizing the rows.
    """

    n_rows: int = 0
    n_samples: int = 0
    prompt_tokens: int = 0
    max_new_tokens: int = 0
    prompt_lengths: Counter[int] = field(default_factory=Counter)
    error_kinds: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    sampled: list[TokenizedPrompt] = field(default_factory=list)
    read_s: float = 0.0


def count_workload(
    prompts: TokenizedInput,
    summary: InputSummary,
    parts: Sequence[int],
    report: Callable[[str], None],
) -> Workload:
    """Read and tokenize the rows of some parts.

    Args:
        prompts: The input.
        summary: The result of checking it.
        parts: The parts to generate, in ascending order.
        report: Receives a line every few seconds.

    Raises:
        InputRowsError: The input has changed since it was checked.
    """
    work, n_read = Workload(), 0
    total = sum(rows_of_part(number, summary.part_rows, summary.rows) for number in parts)
    # Stretches begin at multiples of this among the rows that reach the engine.
    distance = ROWS_PER_STRETCH * max(1, total // SAMPLED_ROWS)
    began_s = reported_s = time.monotonic()

    def reject(completion: Completion) -> None:
        nonlocal n_read
        assert completion.error is not None
        n_read += 1
        work.error_kinds[completion.error.kind] += 1

    for prompt in prompts.prompts(summary, reject=reject, parts=parts, all_samples=False):
        assert prompt is not None, "no part is held back"
        n, length = prompt.prompt.params.n, len(prompt.token_ids)
        if work.n_rows % distance < ROWS_PER_STRETCH:
            work.sampled += [replace(prompt, prompt=row) for row in samples_of(prompt.prompt)]
        work.n_rows += 1
        work.n_samples += n
        work.prompt_tokens += n * length
        work.max_new_tokens += n * prompts.new_token_limit(prompt)
        work.prompt_lengths[length] += 1
        work.truncated += prompt.tokens_dropped > 0
        n_read += 1
        if (now_s := time.monotonic()) - reported_s > REPORT_INTERVAL_S:
            reported_s = now_s
            report(f"{n_read:,} of {total:,} rows tokenized")
    work.read_s = time.monotonic() - began_s
    return work
