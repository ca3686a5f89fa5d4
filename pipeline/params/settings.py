"""The table of sampling settings: types, ranges and texts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# int, float and bool: one value. texts: strings. token_ids: token ids. token_values: an object of
# token ids to numbers, {"50256": -100}. In SamplingParams, the last three are tuples.
Kind = Literal["int", "float", "bool", "texts", "token_ids", "token_values"]

MAX_SEED = 2**63 - 1
# Gumbel noise is below 37, so logit + temperature * noise stays finite
MAX_TEMPERATURE = 1e300
MAX_TEXT_BYTES = 1024
_MAX_INT32 = MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSetting:
    """The type, range and texts of one sampling setting.

    The name is the config key, the field of an input row, and the attribute of SamplingParams. The
    option (`--top-k`) and the environment variable (`GPTBATCH_TOP_K`) follow from it.

    Args:
        kind: The form of the value. int accepts whole numbers only; float accepts both.
        minimum: The smallest number that is accepted, also in a list or an object.
        maximum: The largest number that is accepted.
        max_items: The most items of a list or an object.
        default: The value of the run where neither a config nor an option gives one, in the form
            of SamplingParams. None: the setting is off.
        metavar: The value in the help of the option.
        help: Of the option and the config key.
        column_type: The Arrow type of its column. None: it has no column of its own, and is a key
            in the column sampling_params where its value is not the default.
        meaning: Of the column.
        unit: Of the column; "" where there is none.
        above_minimum: The minimum itself is refused.
    """

    kind: Kind
    minimum: int | float = 0
    maximum: int | float = 0
    max_items: int = 1024
    default: Any
    metavar: str
    help: str
    column_type: Literal["int32", "int64", "float64"] | None = None
    meaning: str = ""
    unit: str = ""
    above_minimum: bool = False

    def accepts(self, value: Any) -> bool:
        """Return whether a value, as SamplingParams holds it, is in the range."""
        if value is None:
            return self.default is None
        if self.kind in ("int", "float"):
            return self.accepts_number(value)
        if self.kind == "bool":
            return True
        if len(value) > self.max_items:
            return False
        if self.kind == "texts":
            return not any(text_problem(text) for text in value)
        if self.kind == "token_ids":
            return all(0 <= token <= MAX_TOKEN_ID for token in value)
        return all(
            0 <= token <= MAX_TOKEN_ID and self.accepts_number(number) for token, number in value
        )

    def accepts_number(self, number: int | float) -> bool:
        """Return whether a number is in the range."""
        is_low = number <= self.minimum if self.above_minimum else number < self.minimum
        return not is_low and number <= self.maximum

    @property
    def range_text(self) -> str:
        """The range of its numbers in messages: `0 to 1`, `above 0 to 1`."""
        least = f"above {self.minimum}" if self.above_minimum else str(self.minimum)
        return f"{least} to {self.maximum}"


def text_problem(text: str) -> str:
    """Return why a text cannot be searched for in completions; "" where it can."""
    if not text:
        return "must not be empty"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "must be UTF-8 text"
    if "\ufffd" in text:
        return "must not hold U+FFFD, which stands for bytes that are no text"
    if len(text.encode()) > MAX_TEXT_BYTES:
        return f"must have at most {MAX_TEXT_BYTES} bytes"
    return ""


# Every sampling setting. CONTRIBUTING.md lists the steps to add one.
# The order is that of the columns, of the options of replay and of the input digest.
SAMPLING_SETTINGS = {
    "seed": SamplingSetting(
        kind="int",
        maximum=MAX_SEED,
        default=0,
        metavar="N",
        help="Run seed. A row without a seed of its own derives one from the run seed and its id.",
        column_type="int64",
        meaning=(
            "the seed that was used: the row's own, or derived from the run seed and prompt_id; of "
            "samples after the first, derived from that and sample_index"
        ),
    ),
    "temperature": SamplingSetting(
        kind="float",
        maximum=MAX_TEMPERATURE,
        default=1.0,
        metavar="T",
        help="Divides the logits before softmax. 0 is greedy decoding.",
        column_type="float64",
        meaning="0 is greedy",
    ),
    "top_k": SamplingSetting(
        kind="int",
        maximum=_MAX_INT32,
        default=0,
        metavar="K",
        help="Sample from the k most likely tokens and ties with the k-th. 0 keeps all tokens.",
        column_type="int32",
        meaning="0 is off",
        unit="tokens",
    ),
    "top_p": SamplingSetting(
        kind="float",
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
    "min_p": SamplingSetting(
        kind="float",
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
    "repetition_penalty": SamplingSetting(
        kind="float",
        minimum=0.01,
        maximum=1000,
        default=1.0,
        metavar="R",
        help=(
            "Divide the positive logits of the tokens of prompt and completion by R, and multiply "
            "negative ones by it. GPT-2's logits are far below 0: 1.2 is nearly a ban. Prefer "
            "presence_penalty. 1 is off."
        ),
    ),
    "presence_penalty": SamplingSetting(
        kind="float",
        minimum=-2,
        maximum=2,
        default=0.0,
        metavar="P",
        help="Subtract P from the logit of each token that the completion holds. 0 is off.",
    ),
    "frequency_penalty": SamplingSetting(
        kind="float",
        minimum=-2,
        maximum=2,
        default=0.0,
        metavar="P",
        help=(
            "Subtract P from the logit of a token for each time that the completion holds it. 0 is "
            "off."
        ),
    ),
    "no_repeat_ngram_size": SamplingSetting(
        kind="int",
        maximum=_MAX_INT32,
        default=0,
        metavar="N",
        help=(
            "Never generate a sequence of N tokens that prompt and completion hold already. 0 is "
            "off."
        ),
    ),
    "logit_bias": SamplingSetting(
        kind="token_values",
        minimum=-100,
        maximum=100,
        default=(),
        metavar="JSON",
        help='Numbers to add to logits, by token id: {"50256": -100}.',
    ),
    "allowed_token_ids": SamplingSetting(
        kind="token_ids",
        max_items=4096,
        default=None,
        metavar="ID",
        help="Token id that may be generated. Default: all tokens.",
    ),
    "bad_words": SamplingSetting(
        kind="texts",
        default=(),
        metavar="TEXT",
        help="Text that the completion must not hold, however it is divided into tokens.",
    ),
    "max_new_tokens": SamplingSetting(
        kind="int",
        minimum=1,
        maximum=_MAX_INT32,
        default=128,
        metavar="N",
        help="Maximum number of tokens to generate per row.",
        column_type="int32",
        meaning="the most tokens that the row might generate",
        unit="tokens",
    ),
    "min_new_tokens": SamplingSetting(
        kind="int",
        maximum=_MAX_INT32,
        default=0,
        metavar="N",
        help=(
            "Generate at least this many tokens before an EOS token, a stop token or a stop string "
            "may end the row. 0 is off."
        ),
    ),
    "stop": SamplingSetting(
        kind="texts",
        max_items=64,
        default=(),
        metavar="TEXT",
        help="Text that ends a row where it appears in the completion, and is cut off.",
    ),
    "include_stop_str_in_output": SamplingSetting(
        kind="bool",
        default=False,
        metavar="",
        help="Leave the stop string that ended a row in its completion.",
    ),
    "stop_token_ids": SamplingSetting(
        kind="token_ids",
        default=(),
        metavar="ID",
        help="Token id that ends a row as an EOS token does, also with ignore_eos.",
    ),
    "n": SamplingSetting(
        kind="int",
        minimum=1,
        maximum=10_000,
        default=1,
        metavar="N",
        help="Samples per prompt: rows of the output that differ in sample_index and seed.",
    ),
    "logprobs": SamplingSetting(
        kind="int",
        maximum=20,
        default=None,
        metavar="N",
        help=(
            "Fill the columns of log probabilities: of each generated token, and of the N most "
            "likely tokens at its step. Default: off."
        ),
    ),
}
