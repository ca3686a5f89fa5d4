"""Recompute and explain each step of a recorded row.

The logits of a row are equal in prefill and in decode, bit for bit. One prefill over prompt and
completion therefore gives the logits of every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbatch.pipeline.engine.logit_adjustments import adjusted_logits
from gptbatch.pipeline.engine.logprobs import token_logprobs
from gptbatch.pipeline.engine.noise import gumbel
from gptbatch.pipeline.engine.sampling import (
    KeptSet,
    kept_range,
    kept_set,
    sample_tokens,
    top_k_size,
)
from gptbatch.pipeline.engine.sampling_step import SampleRequest
from gptbatch.pipeline.kv_cache.interface import KVCache
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.lm_head import MAX_HEAD_ROWS
from gptbatch.pipeline.params.sampling_params import SamplingParams

# Limits of a forward pass over more than one segment.
MAX_TOKENS = 1024
MAX_SEQS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRow:
    """A row whose tokens are recorded.

    Attributes:
        prompt: 1 to n_positions token ids.
        new: The completion, at least one token id.
        params: Sampling parameters.
    """

    prompt: list[int]
    new: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of a row that one prefill takes.

    Attributes:
        row: Index of the row.
        tokens: The tokens, at most n_positions.
        steps: The steps whose logits follow the last len(steps) tokens.
    """

    row: int
    tokens: list[int]
    steps: range


@torch.inference_mode()
def step_hidden(model: GPT, rows: Sequence[RecordedRow]) -> Iterator[tuple[list[Segment], Tensor]]:
    """Yield the head's input of every step of every row, one forward pass at a time.

    A row that fits the context is one segment. Beyond that, where the window slides, each step is
    a segment of its own.

    Yields:
        The segments of a forward pass, and the head's input (S, C) of their steps in order.
    """
    max_seqs = min(MAX_SEQS, max(1, sum(len(row.new) for row in rows)))
    max_tokens = max(MAX_TOKENS, model.config.n_positions)
    # Enough however the tokens are divided among the sequences.
    capacity = model.cache_spec.capacity_for([max_tokens, *[1] * max_seqs])
    cache = model.new_cache(max_seqs, capacity=capacity)
    for batch in _batches(_segments(rows, model.config.n_positions)):
        yield batch, _prefill(model, cache, batch)
        for seq_index in range(len(batch)):
            cache.free(seq_index)


def each_logits(model: GPT, hidden: Tensor) -> Iterator[Tensor]:
    """Yield the logits (V,) of each row of hidden (S, C), computed in pieces."""
    for piece in hidden.split(MAX_HEAD_ROWS):
        yield from model.logits(piece)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A token at a step.

    Attributes:
        token: Token id.
        probability: Of being sampled; 0 outside the kept set.
        noise: Gumbel noise.
        score: logit + temperature * noise.
    """

    token: int
    probability: float
    noise: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """One step explained.

    Attributes:
        step: Index of the new token.
        candidate: The token in question.
        logprob: Its log probability by the model's own logits, as in the column token_logprobs.
        decision_margin: See sampling.py; None in a vocabulary of one.
        rank: 1 for the token with the largest logit.
        kept: Size of the kept set.
        distance: How far the logits are from ones with which the token wins; 0 if it does.
        runners_up: The kept tokens with the next largest scores.
    """

    step: int
    candidate: Candidate
    logprob: float
    decision_margin: float | None
    rank: int
    kept: int
    distance: float
    runners_up: tuple[Candidate, ...]


def explain_step(
    logits: Tensor, request: SampleRequest, token: int, *, runners_up: int = 3
) -> StepTrace:
    """Explain why `token` won a step, or how far it was from that; formulas as in sampling.py.

    Args:
        logits: (V,), as the model gives them. All figures are of the adjusted ones.
        request: What decides the token besides the logits.
        token: The token to explain.
        runners_up: How many other tokens to describe.
    """
    params, step = request.params, request.step
    (logprobs,) = token_logprobs(logits[None], [token], [0], native=False)
    if request.adjustments is not None:
        (logits,) = adjusted_logits(logits[None], [request.adjustments])
    (sampled,) = sample_tokens(logits[None], [params], [step])
    logits = logits.double().cpu()
    token_ids = torch.arange(len(logits))
    noise = gumbel(torch.tensor(params.seed), torch.tensor(step), token_ids)
    scores = logits + params.temperature * noise
    found = kept_set(
        logits[None],
        torch.tensor([top_k_size(params, len(logits))]),
        torch.tensor([kept_range(params)], dtype=torch.float64),
        torch.tensor([params.top_p if params.temperature > 0 else 1.0], dtype=torch.float64),
        torch.tensor([params.temperature], dtype=torch.float64),
    )
    is_kept = torch.zeros(len(logits), dtype=torch.bool)
    is_kept[found.tokens()[1]] = True
    is_kept &= logits > -math.inf
    kept_scores = torch.where(is_kept, scores, -math.inf)
    if params.temperature == 0:
        probabilities = (logits == logits.max()).double() * (token_ids == int(logits.argmax()))
    else:
        kept_logits = torch.where(is_kept, logits / params.temperature, -math.inf)
        probabilities = torch.softmax(kept_logits, 0)
    to_be_kept = 0.0 if is_kept[token] else _reach_of_outside(found, logits[token])
    to_win = float(kept_scores.max() - scores[token])
    order = [int(j) for j in kept_scores.argsort(descending=True, stable=True)[: runners_up + 1]]

    def candidate(j: int) -> Candidate:
        return Candidate(
            token=j,
            probability=float(probabilities[j]),
            noise=float(noise[j]),
            score=float(scores[j]),
        )

    others = [candidate(j) for j in order if j != token and bool(is_kept[j])]
    return StepTrace(
        step=step,
        candidate=candidate(token),
        logprob=logprobs.logprob,
        decision_margin=sampled.decision_margin,
        rank=int((logits > logits[token]).sum()) + 1,
        kept=int(is_kept.sum()),
        distance=max(to_be_kept, to_win, 0.0),
        runners_up=tuple(others[:runners_up]),
    )


def _reach_of_outside(found: KeptSet, logit: Tensor) -> float:
    """Return the distance of a token that is not kept from being kept; see sampling.py."""
    reach = max(0.0, float(found.base_cutoff[0, 0] - logit))
    if found.nucleus is not None and logit < found.nucleus.cutoff()[0, 0]:
        row = torch.zeros(1, dtype=torch.long)
        reach = max(reach, float(found.nucleus.reach_of_outside(row, logit[None])[0]))
    return reach


def _prefill(model: GPT, cache: KVCache, batch: list[Segment]) -> Tensor:
    """Prefill the segments and return the head's input (S, C) of their steps."""
    tokens: list[int] = []
    seq_indices: list[int] = []
    positions: list[int] = []
    logits_indices: list[int] = []
    for seq_index, segment in enumerate(batch):
        length, n_steps = len(segment.tokens), len(segment.steps)
        # Common beginnings before the first step are computed once.
        shared = segment.tokens[: length - n_steps + 1]
        cached = cache.allocate(seq_index, shared, length, share_prefix=True)
        assert cached is not None, "every batch fits the cache"
        cache.mark_scheduled(seq_index, cached, length)
        tokens += segment.tokens[cached:]
        seq_indices += [seq_index] * (length - cached)
        positions += range(cached, length)
        logits_indices += range(len(tokens) - n_steps, len(tokens))
    return model.hidden(
        cache,
        tokens=tokens,
        seq_indices=seq_indices,
        positions=positions,
        logits_indices=logits_indices,
    )


def _segments(rows: Sequence[RecordedRow], n_positions: int) -> Iterator[Segment]:
    for index, row in enumerate(rows):
        # The last new token has no step after it.
        tokens = row.prompt + row.new[:-1]
        n_inside = min(len(tokens), n_positions)
        first_outside = n_inside - len(row.prompt) + 1
        yield Segment(index, tokens[:n_inside], range(first_outside))
        for step in range(first_outside, len(row.new)):
            end = len(row.prompt) + step
            yield Segment(index, tokens[end - n_positions : end], range(step, step + 1))


def _batches(segments: Iterator[Segment]) -> Iterator[list[Segment]]:
    batch: list[Segment] = []
    n_tokens = 0
    for segment in segments:
        n_tokens += len(segment.tokens)
        if batch and (len(batch) == MAX_SEQS or n_tokens > MAX_TOKENS):
            yield batch
            batch, n_tokens = [], len(segment.tokens)
        batch.append(segment)
    if batch:
        yield batch
