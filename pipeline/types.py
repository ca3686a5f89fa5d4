"""The records that the packages exchange, and the table of sampling settings. Imports no torch.

Prompt -> input/tokenize -> TokenizedPrompt -> engine -> Completion -> output -> Parquet row
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "error"]
# bad_row: not readable, or invalid values. too_long: more tokens than the context has positions.
# empty_prompt: no tokens, and the checkpoint has no start token. unknown_token: a token id outside
# the model's vocabulary. unencodable: text without a token. not_finite: NaN or infinity in the
# logits. skipped: named by skip_row.
ErrorKind = Literal[
    "bad_row", "too_long", "empty_prompt", "unknown_token", "unencodable", "not_finite", "skipped"
]
StopReason = Literal["end_of_text", "max_new_tokens", "window"]
WindowFull = Literal["stop", "slide"]

MAX_SEED = 2**63 - 1
# one to two minutes of gpt2 on a CPU; what a crash costs: docs/fault-tolerance.md
DEFAULT_PART_ROWS = 512
# Gumbel noise is below 37, so logit + temperature * noise stays finite
MAX_TEMPERATURE = 1e300
# counter layout of engine/noise.py; it is part of the config hash, since it decides the tokens
NOISE_VERSION = 1
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSetting:
    """The type, range and texts of one sampling setting.

    The name is the config key, the field of an input row, the attribute of SamplingParams and the
    Parquet column. The option (`--top-k`) and the environment variable (`GPTBATCH_TOP_K`) follow
    from it.

    Args:
        type: int accepts whole numbers only; float accepts both.
        minimum: the smallest value that is accepted.
        maximum: the largest value that is accepted.
        default: the value of the run where neither a config nor an option gives one.
        metavar: the value in the help of the option.
        help: of the option and the config key.
        column_type: the Arrow type of the column.
        meaning: of the column.
        unit: of the column; "" where there is none.
        above_minimum: the minimum itself is refused.
    """

    type: type[int] | type[float]
    minimum: int
    maximum: int | float
    default: int | float
    metavar: str
    help: str
    column_type: Literal["int32", "int64", "float64"]
    meaning: str
    unit: str = ""
    above_minimum: bool = False

    def accepts(self, number: int | float) -> bool:
        """Return whether a number is in the range."""
        is_low = number <= self.minimum if self.above_minimum else number < self.minimum
        return not is_low and number <= self.maximum


# Every sampling setting. CONTRIBUTING.md lists the steps to add one.
# The order is that of the columns and of the input digest: new settings go to the end.
SAMPLING_SETTINGS = {
    "seed": SamplingSetting(
        type=int,
        minimum=0,
        maximum=MAX_SEED,
        default=0,
        metavar="N",
        help="Run seed. A row without a seed of its own derives one from the run seed and its id.",
        column_type="int64",
        meaning=(
            "the row seed that was used: the row's own, or derived from the run seed and prompt_id"
        ),
    ),
    "temperature": SamplingSetting(
        type=float,
        minimum=0,
        maximum=MAX_TEMPERATURE,
        default=1.0,
        metavar="T",
        help="Divides the logits before softmax. 0 is greedy decoding.",
        column_type="float64",
        meaning="0 is greedy",
    ),
    "top_k": SamplingSetting(
        type=int,
        minimum=0,
        maximum=_MAX_INT32,
        default=0,
        metavar="K",
        help="Sample from the k most likely tokens and ties with the k-th. 0 keeps all tokens.",
        column_type="int32",
        meaning="0 is off",
        unit="tokens",
    ),
    "max_new_tokens": SamplingSetting(
        type=int,
        minimum=1,
        maximum=_MAX_INT32,
        default=128,
        metavar="N",
        help="Maximum number of tokens to generate per row.",
        column_type="int32",
        meaning="the most tokens that the row might generate",
        unit="tokens",
    ),
    "min_p": SamplingSetting(
        type=float,
        minimum=0,
        maximum=1,
        default=0.0,
        metavar="P",
        help=(
            "Sample from the tokens that are at least P times as likely as the most likely one. 0 "
            "keeps all tokens."
        ),
        column_type="float64",
        meaning="0 is off",
    ),
    "top_p": SamplingSetting(
        type=float,
        minimum=0,
        maximum=1,
        default=1.0,
        metavar="P",
        help=(
            "Sample from the most likely tokens whose probabilities sum to at least P, of those "
            "that top_k keeps. 1 keeps all tokens."
        ),
        column_type="float64",
        meaning="1 is off",
        above_minimum=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The sampling settings of one row, or of a run. SAMPLING_SETTINGS has their ranges.

    In the params of a run, seed is the run seed; in those of a row, the row seed.
    """

    seed: int
    temperature: float
    top_k: int
    max_new_tokens: int
    min_p: float = 0.0
    top_p: float = 1.0

    def as_dict(self) -> dict[str, int | float]:
        """Return the settings by name, in the order of SAMPLING_SETTINGS."""
        return {name: getattr(self, name) for name in SAMPLING_SETTINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One valid input row.

    Attributes:
        index: Index of the row in the input, from 0.
        prompt_id: The row's id; its index as text where the input has no ids.
        text: The prompt as it was read.
        params: The row's own settings, and the run's for the others.
        metadata: The other fields of the row as JSON text; None if there are none.
    """

    index: int
    prompt_id: str
    text: str
    params: SamplingParams
    metadata: str | None


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
    min_decision_margin: float | None = None
    logits_digest: str | None = None
