"""What the settings of a row change in its logits at each step: bias, penalties and masks.

Imports no torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptbatch.pipeline.engine.bad_words import BadWordAutomaton, BadWords
from gptbatch.pipeline.engine.stopping import StopRule
from gptbatch.pipeline.params.sampling_params import SamplingParams

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAdjustments:
    """The changes of one row's logits at one step; logit_adjustments.py has the formula.

    Attributes:
        bias_ids: Tokens with a bias.
        bias: Theirs.
        repeated: Tokens of prompt and completion; empty without a repetition penalty.
        repetition_penalty: Theirs.
        generated: Tokens of the completion; empty without a frequency or presence penalty.
        times: How often the completion holds each of them.
        frequency_penalty: Per time.
        presence_penalty: Of each of them.
        masked: Tokens that are forbidden.
        allowed: The only tokens that are not forbidden; None for all.
    """

    bias_ids: Tokens
    bias: npt.NDArray[np.float32]
    repeated: Tokens
    repetition_penalty: float
    generated: Tokens
    times: npt.NDArray[np.float32]
    frequency_penalty: float
    presence_penalty: float
    masked: Tokens
    allowed: Tokens | None


class RowAdjustments:
    """Follows the tokens of one row and returns the adjustments of its next step.

    Args:
        params: The settings of the row.
        prompt_token_ids: Its prompt.
        rule: Has the tokens that end it, and the bytes of tokens.
        bad_words: The automata of the run.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        rule: StopRule,
        bad_words: BadWords,
    ) -> None:
        self._params, self._rule = params, rule
        self._end_token_ids = np.array(rule.end_token_ids(params), np.int64)
        self._bias_ids = np.array([token for token, _ in params.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._allowed = (
            None if params.allowed_token_ids is None else np.array(params.allowed_token_ids)
        )
        self._n_new_tokens = 0
        # in order of appearance; `_index` has the place of a token in `_generated`
        self._repeated = array("q", dict.fromkeys(prompt_token_ids))
        self._is_repeated = set(self._repeated)
        self._generated, self._times = array("q"), array("f")
        self._index: dict[int, int] = {}
        self._ngrams = _Ngrams(params.no_repeat_ngram_size) if params.no_repeat_ngram_size else None
        if self._ngrams is not None:
            self._ngrams.add_all(prompt_token_ids)
        self._automaton: BadWordAutomaton | None = None
        self._state = 0
        if params.bad_words:
            self._automaton = bad_words.automaton(params.bad_words)

    @staticmethod
    def are_needed(params: SamplingParams) -> bool:
        """Return whether a setting of a row changes its logits."""
        return bool(
            params.repetition_penalty != 1
            or params.presence_penalty
            or params.frequency_penalty
            or params.no_repeat_ngram_size
            or params.logit_bias
            or params.allowed_token_ids is not None
            or params.bad_words
            or params.min_new_tokens
        )

    def next_step(self) -> StepAdjustments | None:
        """Return the adjustments of the next step, None where nothing changes."""
        params = self._params
        has_repetition = params.repetition_penalty != 1
        counts = bool(params.presence_penalty or params.frequency_penalty)
        masked = self._masked()
        is_needed = (
            has_repetition
            or (counts and self._generated)
            or len(masked)
            or len(self._bias)
            or self._allowed is not None
        )
        if not is_needed:
            return None
        return StepAdjustments(
            bias_ids=self._bias_ids,
            bias=self._bias,
            repeated=np.array(self._repeated if has_repetition else (), np.int64),
            repetition_penalty=params.repetition_penalty,
            generated=np.array(self._generated if counts else (), np.int64),
            times=np.array(self._times if counts else (), np.float32),
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            masked=masked,
            allowed=self._allowed,
        )

    def add(self, token: int) -> None:
        """Take the next new token."""
        self._n_new_tokens += 1
        if token not in self._is_repeated:
            self._is_repeated.add(token)
            self._repeated.append(token)
        index = self._index.setdefault(token, len(self._generated))
        if index == len(self._generated):
            self._generated.append(token)
            self._times.append(0)
        self._times[index] += 1
        if self._ngrams is not None:
            self._ngrams.add(token)
        if self._automaton is not None:
            self._state = self._automaton.next_state(self._state, self._rule.token_bytes[token])

    def _masked(self) -> Tokens:
        masked: list[Tokens] = []
        if self._n_new_tokens < self._params.min_new_tokens:
            masked.append(self._end_token_ids)
        if self._ngrams is not None:
            masked.append(np.array(self._ngrams.completing(), np.int64))
        if self._automaton is not None:
            masked.append(self._automaton.banned(self._state))
        return np.concatenate(masked) if masked else np.empty(0, np.int64)


def next_adjustments(adjustments: RowAdjustments | None) -> StepAdjustments | None:
    """Return the adjustments of the next step of a row; None where nothing changes."""
    return None if adjustments is None else adjustments.next_step()


class _Ngrams:
    """The n-grams of a growing sequence of tokens."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._last: tuple[int, ...] = ()
        self._followers: dict[tuple[int, ...], dict[int, None]] = {}

    def add_all(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        if len(self._last) == self._size - 1:
            self._followers.setdefault(self._last, {})[token] = None
        self._last = (*self._last, token)[1 - self._size :] if self._size > 1 else ()

    def completing(self) -> Sequence[int]:
        """Return the tokens that would complete an n-gram that the sequence holds already."""
        return tuple(self._followers.get(self._last, ()))
