"""A sequence on its way through the engine, and its chunks.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

from gptbatch.pipeline.engine.row_adjustments import RowAdjustments
from gptbatch.pipeline.engine.stopping import StopCheck
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import (
    ENDING_STOP_REASONS,
    Completion,
    FinishReason,
    RowError,
    StopReason,
    Timing,
    TokenizedPrompt,
    TokenLogprobs,
)


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the tokens generated for it so far.

    Attributes:
        source: The prompt.
        tokens: Prompt tokens, then new tokens.
        n_computed_tokens: Tokens of the context (see `context_start`) that are in the KV cache.
        n_cached_tokens: Prompt tokens that another sequence computed.
        arrival_order: Sequences that were added to the scheduler before it.
        schedule_order: 1 for the first sequence that was scheduled, 2 for the next, ...
        scheduled_s: Monotonic clock of its first step; None while waiting.
        started_at_s: Wall clock of its first step.
        first_token_s: Monotonic clock of its first new token.
        last_token_s: Monotonic clock of its latest new token.
        steps_before: Steps of the engine before its first one.
        rows_before: Sum of the batch sizes of these steps.
        min_decision_margin: Smallest decision margin of its steps (see sampling.py).
        logits_hash: SHA-256 of all its logits; None unless they are recorded.
        stop_check: Tells when it ends; None while it is waiting.
        adjustments: Changes its logits before they are sampled; None for none.
        logprobs: Of its new tokens; empty where the row does not request them.
        stop_reason: Why it is finished; None while it runs, or with an error.
        error: Why it has no completion.
    """

    source: TokenizedPrompt
    tokens: list[int] = field(init=False)
    n_computed_tokens: int = field(default=0, init=False)
    n_cached_tokens: int = field(default=0, init=False)
    arrival_order: int = field(default=0, init=False)
    schedule_order: int = field(default=0, init=False)
    scheduled_s: float | None = field(default=None, init=False)
    started_at_s: float = field(default=0.0, init=False)
    first_token_s: float = field(default=0.0, init=False)
    last_token_s: float = field(default=0.0, init=False)
    steps_before: int = field(default=0, init=False)
    rows_before: int = field(default=0, init=False)
    min_decision_margin: float = field(default=math.inf, init=False)
    logits_hash: hashlib._Hash | None = field(default=None, init=False)
    stop_check: StopCheck | None = field(default=None, init=False)
    adjustments: RowAdjustments | None = field(default=None, init=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list, init=False)
    stop_reason: StopReason | None = field(default=None, init=False)
    error: RowError | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.source.token_ids)

    @property
    def params(self) -> SamplingParams:
        """Its sampling parameters."""
        return self.source.prompt.params

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.source.token_ids)

    @property
    def n_new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.n_prompt_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it has stopped, with a reason or an error."""
        return self.stop_reason is not None or self.error is not None

    def max_length(self, n_positions: int) -> int:
        """Return the most positions that it may reach."""
        return min(n_positions, self.n_prompt_tokens + self.params.max_new_tokens)

    def context_start(self, n_positions: int) -> int:
        """Return the index of the first token of the context: the n_positions most recent ones."""
        return max(0, len(self.tokens) - n_positions)

    def to_completion(self, *, mean_batch_size: float) -> Completion:
        """Return the result of a finished sequence; an error has no tokens."""
        assert self.scheduled_s is not None
        assert self.stop_check is not None
        source, has_error = self.source, self.error is not None
        finish_reason: FinishReason = (
            "stop" if self.stop_reason in ENDING_STOP_REASONS else "length"
        )
        has_margin = not has_error and math.isfinite(self.min_decision_margin)
        has_digest = not has_error and self.logits_hash is not None
        return Completion(
            prompt=source.prompt,
            prompt_tokens=self.n_prompt_tokens,
            prompt_tokens_dropped=source.tokens_dropped,
            prompt_token_ids=source.token_ids,
            token_ids=[] if has_error else self.tokens[self.n_prompt_tokens :],
            finish_reason="error" if has_error else finish_reason,
            stop_reason=None if has_error else self.stop_reason,
            error=self.error,
            stop_string=self.stop_check.stop_string,
            text_bytes=self.stop_check.text_bytes,
            logprobs=None if has_error or self.params.logprobs is None else self.logprobs,
            min_decision_margin=self.min_decision_margin if has_margin else None,
            logits_digest=self.logits_hash.hexdigest()
            if has_digest and self.logits_hash is not None
            else None,
            timing=Timing(
                queue_s=self.scheduled_s - source.read_s,
                prefill_s=self.first_token_s - self.scheduled_s,
                decode_s=self.last_token_s - self.first_token_s,
                mean_batch_size=mean_batch_size,
                started_at_s=self.started_at_s,
                cached_tokens=self.n_cached_tokens,
            ),
        )


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens of one sequence that a step computes.

    Attributes:
        seq_index: Index of the sequence in the running batch. After a step in which others finish,
            it may be another one.
        first: Position of the first token.
        tokens: The tokens.
        needs_logits: The next token is sampled after the last of them.
    """

    sequence: Sequence
    seq_index: int
    first: int
    tokens: list[int]
    needs_logits: bool

    @property
    def context(self) -> int:
        """Sum of the context lengths that its tokens attend to."""
        count = len(self.tokens)
        return count * self.first + count * (count + 1) // 2
