"""The time that a run has left, by the tokens that are left.

Tokens of rows that were not read yet are taken to be like those of the rows that were. Rows stop by
themselves at the rate seen so far, per token. Imports no torch.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gptbatch.pipeline.types import ENDING_STOP_REASONS, Completion, Prompt, TokenizedPrompt

if TYPE_CHECKING:
    from gptbatch.pipeline.engine.engine import EngineStats


class TimeLeft:
    """Counts the tokens of one run of the engine.

    Args:
        rows: Rows of the input to generate.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._began_s = time.monotonic()
        self._rows_read = self._samples = self._stopped = 0
        self._prompt_tokens = self._limit = self._limit_done = self._new_done = 0
        # the limits of the samples that run or wait
        self._limits: dict[tuple[int, int], int] = {}

    def read(self, prompt: TokenizedPrompt, limit: int) -> None:
        """Take a sample that was read, which has at most `limit` new tokens."""
        self._rows_read += prompt.prompt.sample_index == 0
        self._samples += 1
        self._prompt_tokens += len(prompt.token_ids)
        self._limit += limit
        self._limits[_key(prompt.prompt)] = limit

    def finished(self, completion: Completion) -> None:
        """Take a sample that is done. Those that never reached the engine have no timing."""
        if completion.timing is None:
            self._rows_read += completion.prompt.sample_index == 0
            return
        self._stopped += completion.stop_reason in ENDING_STOP_REASONS
        self._limit_done += self._limits.pop(_key(completion.prompt))
        self._new_done += len(completion.token_ids)

    def seconds(self, stats: EngineStats) -> float | None:
        """Return the seconds that are left; None before a token is decoded or a row done."""
        if not stats.new_tokens or not (stats.decoded_tokens or self._new_done):
            return None
        unread = max(0, self._rows - self._rows_read) / self._rows_read
        limit = self._limit / self._samples
        # the mean of a geometric distribution that ends at the limit
        rate = self._stopped / stats.new_tokens
        length = (1 - (1 - rate) ** limit) / rate if rate else limit
        new_tokens = (self._limit * (1 + unread) - self._limit_done) * length / limit
        new_tokens -= stats.new_tokens - self._new_done
        prompt_tokens = self._prompt_tokens * (1 + unread)
        prompt_tokens *= stats.prefilled_tokens / max(
            1, stats.prefilled_tokens + stats.cached_tokens
        )
        steps_s = stats.prefill_s + stats.decode_s
        seconds = max(0.0, new_tokens) * stats.decode_s / stats.new_tokens
        seconds += max(0.0, prompt_tokens - stats.prefilled_tokens) * (
            stats.prefill_s / max(1, stats.prefilled_tokens)
        )
        # Between steps, rows are read and written.
        return seconds * max(1.0, (time.monotonic() - self._began_s) / steps_s)


def _key(prompt: Prompt) -> tuple[int, int]:
    return prompt.index, prompt.sample_index


def seconds_left_by_rows(elapsed_s: float, rows: int, rows_left: int) -> float | None:
    """Return the seconds that are left if all rows take the same time; None without a row."""
    return elapsed_s / rows * max(0, rows_left) if rows else None
