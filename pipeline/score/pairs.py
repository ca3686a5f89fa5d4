"""Encodes pairs of context and continuation as lm-evaluation-harness does.

The rules are those of its `TemplateLM` and `HFLM`:

1. Whitespace at the end of the context moves to the front of the continuation.
2. The context is encoded alone: n tokens. The continuation is what follows the first n tokens of
   context and continuation encoded together.
3. An empty context is the start token. The continuation is then encoded without the tokenizer's
   template. If it begins with the start token, this token is the context.
4. A pair that is too long loses tokens at its front: the last n_positions + 1 tokens remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gptbatch.pipeline.input.tokenizer import EncodedText, LoadedTokenizer, PromptTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPair:
    """The tokens of a context and of its continuation.

    Attributes:
        context: At least one token id, unless there is a problem.
        continuation: At least one token id, unless there is a problem.
        boundary_merged: The tokens of the whole text do not begin with those of the context: a
            token spans the boundary, and the cut is not at it.
        context_dropped: Tokens cut off the front of the context.
        problem: Why the pair cannot be scored; "" if it can.
    """

    context: list[int]
    continuation: list[int]
    boundary_merged: bool = False
    context_dropped: int = 0
    problem: str = ""


class PairEncoder:
    """Encodes pairs of texts.

    Args:
        loaded: The tokenizer of the checkpoint.
        start_token: The context of a continuation without one. None refuses such pairs.
        parse_special: Encode the text of a special token as that token, not as plain text.
        add_special_tokens: Add the tokens of the tokenizer's template, such as `<s>`.
        on_lost_text: "error" refuses texts with characters that the tokenizer drops.
    """

    def __init__(
        self,
        loaded: LoadedTokenizer,
        *,
        start_token: int | None,
        parse_special: bool = False,
        add_special_tokens: bool = True,
        on_lost_text: Literal["error", "warn"] = "error",
    ) -> None:
        self._start_token, self._on_lost_text = start_token, on_lost_text
        self._plain, self._templated = (
            PromptTokenizer(
                loaded,
                start_token=None,
                parse_special=parse_special,
                add_special_tokens=adds_template,
            )
            for adds_template in (False, add_special_tokens)
        )

    def encode(self, texts: Sequence[str], *, template: bool = True) -> list[EncodedText]:
        """Encode texts. An empty text has the tokens of the template, or none."""
        tokenizer = self._templated if template else self._plain
        return tokenizer.encode(list(texts)) if texts else []

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        """Encode pairs of context and continuation."""
        moved = [_move_whitespace(context, continuation) for context, continuation in pairs]
        contexts = list(dict.fromkeys(context for context, _ in moved))
        encoded = dict(zip(contexts, self.encode(contexts), strict=True))
        wholes = self.encode([context + continuation for context, continuation in moved])
        alone = [number for number, (context, _) in enumerate(pairs) if not context]
        plain = self.encode([pairs[number][1] for number in alone], template=False)
        results = [
            self._cut(encoded[context], whole)
            for (context, _), whole in zip(moved, wholes, strict=True)
        ]
        for number, continuation in zip(alone, plain, strict=True):
            results[number] = self._after_start_token(continuation)
        return results

    def _cut(self, context: EncodedText, whole: EncodedText) -> EncodedPair:
        if problem := self._problem(context) or self._problem(whole):
            return _refused(problem)
        length = len(context.token_ids)
        return self._pair(
            context.token_ids,
            whole.token_ids[length:],
            boundary_merged=whole.token_ids[:length] != context.token_ids,
        )

    def _after_start_token(self, continuation: EncodedText) -> EncodedPair:
        if problem := self._problem(continuation):
            return _refused(problem)
        tokens = continuation.token_ids
        has_start = bool(tokens) and tokens[0] == self._start_token
        return self._pair(tokens[:1], tokens[1:]) if has_start else self._pair([], tokens)

    def _pair(
        self, context: list[int], continuation: list[int], *, boundary_merged: bool = False
    ) -> EncodedPair:
        if not context:
            if self._start_token is None:
                return _refused(
                    "the context is empty, and the checkpoint names no token to start from"
                )
            context = [self._start_token]
        pair = EncodedPair(
            context=context, continuation=continuation, boundary_merged=boundary_merged
        )
        problem = (
            ""
            if continuation
            else "the tokenizer merges the whole continuation into the context"
            if boundary_merged
            else "the continuation has no tokens"
        )
        return replace(pair, problem=problem)

    def _problem(self, text: EncodedText) -> str:
        if text.problem:
            return f"the text cannot be encoded: {text.problem}"
        if text.lost and self._on_lost_text == "error":
            return f"the tokenizer drops {text.lost} characters; on_lost_text: warn scores the rest"
        return ""


def fit(pair: EncodedPair, *, n_positions: int, vocab_size: int) -> EncodedPair:
    """Drop tokens of the context that do not fit, and refuse what the model cannot score.

    The last token of a pair is predicted, not read: n_positions + 1 tokens fit.
    """
    if pair.problem:
        return pair
    largest = max(*pair.context, *pair.continuation)
    if largest >= vocab_size:
        problem = f"it holds token {largest}, which the model (vocab_size {vocab_size}) lacks"
        return replace(pair, problem=problem)
    count = len(pair.continuation)
    if count > n_positions:
        problem = f"the continuation has {count} tokens, more than n_positions ({n_positions})"
        return replace(pair, problem=problem)
    dropped = max(0, len(pair.context) + count - (n_positions + 1))
    return replace(pair, context=pair.context[dropped:], context_dropped=dropped)


def _move_whitespace(context: str, continuation: str) -> tuple[str, str]:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _refused(problem: str) -> EncodedPair:
    return EncodedPair(context=[], continuation=[], problem=problem)
