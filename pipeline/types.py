"""The records that the packages exchange. Imports no torch.

Prompt -> input/tokenize -> TokenizedPrompt -> engine -> Completion -> output -> Parquet row
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gptbatch.pipeline.params.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "error"]
# bad_row: not readable, or invalid values. too_long: more tokens than the context has positions.
# empty_prompt: no tokens, and the checkpoint has no start token. unknown_token: a token id outside
# the model's vocabulary. unencodable: text without a token. invalid_setting: a setting that the
# model or its tokenizer cannot follow. not_finite: NaN or infinity in the logits.
# no_token_allowed: the settings of the row forbid every token. skipped: named by skip_row.
ErrorKind = Literal[
    "bad_row",
    "too_long",
    "empty_prompt",
    "unknown_token",
    "unencodable",
    "invalid_setting",
    "not_finite",
    "no_token_allowed",
    "skipped",
]
StopReason = Literal["end_of_text", "stop_token", "stop_string", "max_new_tokens", "window"]
# those of finish_reason "stop"; the others are "length"
ENDING_STOP_REASONS: tuple[StopReason, ...] = ("end_of_text", "stop_token", "stop_string")
WindowFull = Literal["stop", "slide"]
# What a run found out about its bits. portable: a row's bits depend on neither the batch nor the
# machine (docs/arithmetic.md). verified: they do not depend on the batch. unverified: the self-test
# failed. off: it was skipped.
BatchInvariance = Literal["portable", "verified", "unverified", "off"]
BATCH_INVARIANT: tuple[BatchInvariance, ...] = ("portable", "verified")

# With one sample per row, it takes gpt2 one to two minutes on a CPU. docs/fault-tolerance.md says
# what a crash costs.
DEFAULT_PART_ROWS = 512
# counter layout of engine/noise.py; it is part of the config hash, since it decides the tokens
NOISE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One valid input row.

    Attributes:
        index: Index of the row in the input, from 0.
        prompt_id: The row's id; its index as text where the input has no ids.
        text: The prompt as it was read.
        params: The row's own settings, and the run's for the others. The seed is the row seed.
        metadata: The other fields of the row as JSON text; None if there are none.
        sample_index: Index of the sample of the row, from 0. The input yields sample 0.
    """

    index: int
    prompt_id: str
    text: str
    params: SamplingParams
    metadata: str | None
    sample_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """The error of a row without a completion. `reason` is the text of the column `error`.

    The reason never quotes the prompt.
    """

    kind: ErrorKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPrompt:
    """The token ids of a prompt.

    Attributes:
        token_ids: The tokens that fit the context.
        tokens_dropped: Number of tokens cut from the front by truncate_left.
        read_s: Monotonic clock in seconds at which the row was read.
    """

    prompt: Prompt
    token_ids: list[int]
    tokens_dropped: int
    read_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one step: of softmax(logits), before temperature and other settings.

    Attributes:
        logprob: Of the token.
        top_ids: The most likely tokens, most likely first, the smaller id first among ties.
        top_logprobs: Theirs.
    """

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Observed times of one row, in seconds of a monotonic clock.

    Rows of a batch run at the same time, so sums over rows exceed the wall time of the run.

    Attributes:
        queue_s: From reading the row to the first step that computes one of its tokens.
        prefill_s: From there until its first new token reaches the host.
        decode_s: From its first new token to its last.
        mean_batch_size: Mean number of rows per step, over the steps of this row.
        started_at_s: Wall clock in seconds since 1970 at which the row was scheduled.
        cached_tokens: Prompt tokens that were found in the prefix cache.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    mean_batch_size: float
    started_at_s: float
    cached_tokens: int = 0

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prefill_s + self.decode_s

    @property
    def time_to_first_token_s(self) -> float:
        return self.queue_s + self.prefill_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The result of one prompt: new tokens or an error.

    Attributes:
        prompt_tokens: Number of prompt tokens, without those that were dropped.
        token_ids: The new tokens, with the EOS token if there is one; empty for an error.
        timing: None for a row that the engine never computed.
        prompt_token_ids: The prompt tokens that the engine computed.
        stop_string: The stop string that ended the row.
        text_bytes: The text is the first text_bytes bytes of the tokens' text; None for all.
        logprobs: Log probabilities of each new token; None where the row does not request them.
        min_decision_margin: Smallest decision margin of all steps (see engine/sampling.py);
            None without a step.
        logits_digest: SHA-256 in hexadecimal of the logits of every step; None unless
            record_logits_digest is set.
    """

    prompt: Prompt
    prompt_tokens: int
    prompt_tokens_dropped: int
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: StopReason | None
    error: RowError | None
    timing: Timing | None
    prompt_token_ids: list[int] = field(default_factory=list)
    stop_string: str | None = None
    text_bytes: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    min_decision_margin: float | None = None
    logits_digest: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion and its text, None for an error: one row of the output's table."""

    completion: Completion
    text: str | None
