"""SamplingParams: the sampling settings of one row. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.params.settings import MAX_TOKEN_ID, SAMPLING_SETTINGS, SamplingSetting

# The automaton of bad words has a state per byte, of 512 bytes.
MAX_BAD_WORD_BYTES = 8192
# The settings without a column of their own, and their defaults
_OTHERS = {
    name: setting.default
    for name, setting in SAMPLING_SETTINGS.items()
    if setting.column_type is None
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The sampling settings of one row, or of a run. SAMPLING_SETTINGS has their ranges.

    In the params of a run, seed is the run seed; in those of a row, the row seed; in those of a
    sample, the seed of its noise. logit_bias holds (token id, number) in ascending order of ids.
    """

    seed: int
    temperature: float
    top_k: int
    max_new_tokens: int
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    logprobs: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the settings by name, in the order of SAMPLING_SETTINGS."""
        return {name: getattr(self, name) for name in SAMPLING_SETTINGS}

    def others(self) -> dict[str, Any]:
        """Return the settings without a column of their own that differ from their defaults."""
        return {
            name: value
            for name, default in _OTHERS.items()
            if (value := getattr(self, name)) != default
        }

    def problem(self) -> str:
        """Return which settings contradict each other; "" where none do."""
        if self.n > 1 and self.temperature == 0:
            return (
                f"n is {self.n}, and temperature 0 gives equal samples; set a temperature above 0, "
                "or n to 1"
            )
        if self.min_new_tokens > self.max_new_tokens:
            return (
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if self.include_stop_str_in_output and not self.stop:
            return "include_stop_str_in_output needs stop"
        if (total := sum(len(word.encode()) for word in self.bad_words)) > MAX_BAD_WORD_BYTES:
            return f"bad_words have {total} bytes in all; at most {MAX_BAD_WORD_BYTES} are possible"
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            return "allowed_token_ids is empty; null allows all tokens"
        return ""


def parse_token_values(value: Any) -> Any:
    """Return an object of numbers by token id in JSON's form, from JSON text or from a mapping.

    A value of another type is returned as it is, for the caller to reject.

    Raises:
        ValueError: The text is not JSON, or a key or a number is not valid.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=_unique)
        except ValueError as error:
            raise ValueError(f'should be JSON such as {{"50256": -100}} ({error})') from error
    if not isinstance(value, Mapping):
        return value
    setting = SAMPLING_SETTINGS["logit_bias"]
    # YAML tells 5 and "5" apart.
    value = _unique([(str(token), number) for token, number in value.items()])
    for token, number in value.items():
        if not re.fullmatch("0|[1-9][0-9]{0,9}", token) or int(token) > MAX_TOKEN_ID:
            raise ValueError(f"should have token ids as keys (key {token!r})")
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not setting.accepts_number(number):
            raise ValueError(f"should hold numbers from {setting.range_text} (key {token!r})")
    return {token: float(number) for token, number in value.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a dict. Raises ValueError where a key stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"should hold each token once (key {twice!r})")
    return found


def to_attribute(value: Any, setting: SamplingSetting) -> Any:
    """Convert the value of a setting from JSON's form to that of SamplingParams.

    Raises:
        ValueError: It has another type, or is out of range.
    """
    if value is None and setting.default is None:
        return None
    if not _has_type(value, setting):
        raise ValueError(f"{value!r:.100} is no value of this setting")
    attribute = value
    if setting.kind in ("texts", "token_ids"):
        attribute = tuple(value)
    elif setting.kind == "token_values":
        attribute = tuple(sorted((int(token), float(number)) for token, number in value.items()))
    if not setting.accepts(attribute):
        raise ValueError(f"{value!r:.100} is out of range")
    return attribute


def _has_type(value: Any, setting: SamplingSetting) -> bool:
    """Return whether a value has the form of a setting in JSON."""

    def is_number(number: Any) -> bool:
        return isinstance(number, (int, float)) and not isinstance(number, bool)

    match setting.kind:
        case "int":
            return type(value) is int
        case "float":
            return is_number(value)
        case "bool":
            return type(value) is bool
        case "texts":
            return isinstance(value, list) and all(isinstance(text, str) for text in value)
        case "token_ids":
            return isinstance(value, list) and all(type(token) is int for token in value)
        case "token_values":
            return isinstance(value, dict) and all(
                isinstance(token, str) and token.isdecimal() and is_number(number)
                for token, number in value.items()
            )


def to_json_value(value: Any, setting: SamplingSetting) -> Any:
    """Convert the value of a setting from SamplingParams to JSON's form."""
    if setting.kind in ("texts", "token_ids"):
        return None if value is None else list(value)
    if setting.kind == "token_values":
        return {str(token): number for token, number in value}
    return value


def to_column(params: SamplingParams) -> str | None:
    """Return the column sampling_params: canonical JSON of `others`, None where it is empty."""
    others = {
        name: to_json_value(value, SAMPLING_SETTINGS[name])
        for name, value in params.others().items()
    }
    if not others:
        return None
    return json.dumps(others, ensure_ascii=False, separators=(",", ":"))


def from_row(row: Mapping[str, Any]) -> SamplingParams:
    """Return the sampling parameters of a recorded row.

    A setting that its version lacks has its default.

    Raises:
        ValueError: A column holds no value of its setting.
    """
    try:
        others = json.loads(row.get("sampling_params") or "{}", object_pairs_hook=_unique)
        if not isinstance(others, dict):
            raise TypeError("it is no object")
        if unknown := set(others) - _OTHERS.keys():
            raise ValueError(f"no setting is called {min(unknown)!r}")
        settings = {
            name: to_attribute(others[name], SAMPLING_SETTINGS[name]) if name in others else default
            for name, default in _OTHERS.items()
        }
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its sampling_params cannot be read ({error})") from error
    for name, setting in SAMPLING_SETTINGS.items():
        if setting.column_type is None:
            continue
        settings[name] = setting.default if row[name] is None else row[name]
        if not setting.accepts(settings[name]):
            raise ValueError(f"its {name} is {row[name]}")
    return SamplingParams(**settings)
