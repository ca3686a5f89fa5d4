"""The nouns that travel between the rooms: frozen records, no torch, no files.

Prompt -> (tokenizer) -> TokenizedPrompt -> (engine) -> Completion -> (data) -> one row of a part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "error"]
# bad_row: could not be read, or holds invalid values. too_long: more tokens than the context. empty_prompt: nothing to start from.
# unknown_token: the model lacks a token of the prompt. unencodable: the prompt holds text that no
# token stands for. not_finite: the logits hold NaN or infinity. skipped: the user named it.
ErrorKind = Literal[
    "bad_row", "too_long", "empty_prompt", "unknown_token", "unencodable", "not_finite", "skipped"
]
StopReason = Literal["end_of_text", "max_new_tokens", "window"]
WindowFull = Literal["stop", "slide"]

MAX_SEED = 2**63 - 1
DEFAULT_PART_ROWS = 512  # about a minute of gpt2 on a CPU: what a kill can cost
MAX_TEMPERATURE = 1e300  # noise is below 37, so that no score overflows
NOISE_VERSION = 1  # the layout of generation/noise.py; another layout gives other completions
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSetting:
    """One sampling setting: its name, its range and its words, for every place that has it.

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


# Every sampling setting. To add one: an entry here, an attribute of SamplingParams and of
# JobConfig, and the sampler (engine/sampling.py, its kernel, and engine/reference.py).
# The order is that of the columns and of the input digest: new settings go to the end.
SAMPLING_SETTINGS = {
    "seed": SamplingSetting(
        type=int,
        minimum=0,
        maximum=MAX_SEED,
        default=0,
        metavar="N",
        help="run seed; rows without a seed derive theirs from it and their id",
        column_type="int64",
        meaning="the row seed that was used: the row's own, or derived from the run seed and prompt_id",
    ),
    "temperature": SamplingSetting(
        type=float,
        minimum=0,
        maximum=MAX_TEMPERATURE,
        default=1.0,
        metavar="T",
        help="divides the logits before softmax; 0 is greedy",
        column_type="float64",
        meaning="0 is greedy",
    ),
    "top_k": SamplingSetting(
        type=int,
        minimum=0,
        maximum=_MAX_INT32,
        default=0,
        metavar="K",
        help="keep the k likeliest tokens and ties with the last; 0 keeps all",
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
        help="most tokens to generate for a row",
        column_type="int32",
        meaning="the most tokens that the row might generate",
        unit="tokens",
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

    def as_dict(self) -> dict[str, int | float]:
        """Return the settings by name, in the order of SAMPLING_SETTINGS."""
        return {name: getattr(self, name) for name in SAMPLING_SETTINGS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One input row, its parameters resolved. `metadata` is the JSON text of its other fields, None without any."""

    index: int
    prompt_id: str
    text: str
    params: SamplingParams
    metadata: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """Why a row has no completion. `reason` is what the table says; it never quotes the prompt."""

    kind: ErrorKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPrompt:
    """A prompt that is ready for the engine. `read_s` is the monotonic clock when its row was read."""

    prompt: Prompt
    token_ids: list[int]
    tokens_dropped: int
    read_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Observed seconds of a monotonic clock; rows of a batch share time, so sums over rows exceed the run's.

    queue_s: from reading the row to its first token entering a step. prefill_s: from there to its first new token known
    on the host. decode_s: from there to its last. mean_batch_size: mean rows a step while the row was resident.
    started_at_s: wall clock (seconds since 1970) at admission. cached_tokens: of the prompt, what another row had computed.
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
    """How one prompt ended. An error has its reason and no tokens; `timing` is None when it never entered the engine.

    prompt_token_ids: what the engine took, [] when it took nothing. min_decision_margin: the smallest margin
    of its steps (see sampling.py), None without a step. logits_digest: hexadecimal SHA-256 of the
    bits of every step's logits, None unless it was asked for.
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
