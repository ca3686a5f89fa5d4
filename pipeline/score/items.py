"""The items of a score run: pairs of token ids, in windows, and their rows of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from gptbatch.pipeline.audit.loaded_run import LoadedRun
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.score.pairs import EncodedPair, PairEncoder, fit
from gptbatch.pipeline.score.rows import ScoreRow
from gptbatch.pipeline.score.scoring import PairScore, TokenPair
from gptbatch.pipeline.score.table import SCHEMA

# Continuations that are sorted and written together.
WINDOW_PAIRS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """A row of the table before it is scored."""

    prompt_id: str
    prompt_index: int
    choice_index: int
    continuation: str | None
    pair: EncodedPair


def input_windows(
    rows: Iterator[ScoreRow], encoder: PairEncoder, gpt_config: GPTConfig
) -> Iterator[list[ScoreItem]]:
    """Yield the encoded continuations of an input, WINDOW_PAIRS at a time."""
    pairs = (
        (row, choice, continuation)
        for row in rows
        for choice, continuation in enumerate(row.continuations)
    )
    while window := list(islice(pairs, WINDOW_PAIRS)):
        encoded = encoder.encode_pairs(
            [(row.prompt.text, continuation) for row, _, continuation in window]
        )
        yield [
            ScoreItem(
                prompt_id=row.prompt.prompt_id,
                prompt_index=row.prompt.index,
                choice_index=choice,
                continuation=continuation,
                pair=fit(
                    pair, n_positions=gpt_config.n_positions, vocab_size=gpt_config.vocab_size
                ),
            )
            for (row, choice, continuation), pair in zip(window, encoded, strict=True)
        ]


def recorded_windows(loaded_run: LoadedRun) -> Iterator[list[ScoreItem]]:
    """Yield the recorded completions of a run, WINDOW_PAIRS at a time."""
    rows = loaded_run.run.rows()
    while window := list(islice(rows, WINDOW_PAIRS)):
        prompts = loaded_run.prompt_token_ids(window)
        yield [
            ScoreItem(
                prompt_id=row["prompt_id"],
                prompt_index=row["prompt_index"],
                choice_index=row["sample_index"] or 0,
                continuation=row["completion"],
                pair=_recorded_pair(row, prompt, problem, loaded_run.gpt_config.vocab_size),
            )
            for row, (prompt, problem) in zip(window, prompts, strict=True)
        ]


def _recorded_pair(
    row: dict[str, Any], prompt: list[int], problem: str, vocab_size: int
) -> EncodedPair:
    tokens: list[int] = row["completion_token_ids"]
    if row["finish_reason"] == "error":
        problem = f"an error row of the run: {row['error']}"
    elif not tokens:
        problem = problem or "the completion has no tokens"
    elif not 0 <= min(tokens) <= max(tokens) < vocab_size:
        problem = (
            f"the completion holds a token outside of the model's vocabulary ({vocab_size} tokens)"
        )
    return EncodedPair(context=prompt, continuation=tokens, problem=problem)


def token_pairs(items: Sequence[ScoreItem]) -> list[TokenPair]:
    """Return the pairs to score, of the items without a problem."""
    return [
        TokenPair(item.pair.context, item.pair.continuation)
        for item in items
        if not item.pair.problem
    ]


def score_table(items: Sequence[ScoreItem], scores: Sequence[PairScore]) -> pa.Table:
    """Return the rows of items, of which those without a problem have a score."""
    remaining = iter(scores)
    rows = [_row(item, None if item.pair.problem else next(remaining)) for item in items]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _row(item: ScoreItem, score: PairScore | None) -> dict[str, Any]:
    error = item.pair.problem or None
    if score is not None and not score.is_finite:
        score, error = None, "the logits hold NaN or infinity"
    tokens = [] if score is None else item.pair.continuation
    return {
        "prompt_id": item.prompt_id,
        "prompt_index": item.prompt_index,
        "choice_index": item.choice_index,
        "continuation": item.continuation,
        "continuation_token_ids": tokens,
        "token_logprobs": [] if score is None else score.token_logprobs,
        "logprob": None if score is None else score.logprob,
        "is_greedy": None if score is None else score.is_greedy,
        "tokens": len(tokens),
        "bytes": len((item.continuation or "").encode("utf-8")),
        "context_tokens_dropped": item.pair.context_dropped,
        "boundary_merged": item.pair.boundary_merged,
        "error": error,
    }
