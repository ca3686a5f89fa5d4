"""What happened at each step of a row whose tokens are known: its logits again, by one prefill, and the choice explained.

A row's logits are the same bits in prefill and in decode, so that one pass over prompt and completion gives those of every step.
Knows: token ids and the network. Does not know: records, text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbatch.pipeline.engine.noise import gumbel
from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.lm_head import HEAD_ROWS
from gptbatch.pipeline.types import SamplingParams

MOST_TOKENS = 1024  # of a call with more than one passage
MAX_SEQS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRow:
    """A row whose tokens are known. prompt: 1 to n_positions token ids; new: at least one, the row's completion."""

    prompt: list[int]
    new: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Passage:
    """A run of tokens of a row that one prefill takes, and the steps whose logits its last tokens give."""

    row: int
    tokens: list[int]
    steps: range


@torch.inference_mode()
def step_hidden(model: GPT, rows: Sequence[KnownRow]) -> Iterator[tuple[list[Passage], Tensor]]:
    """What the head sees (S, C) at every step of every row, a call of the network at a time: of the first passage, of the second, ...

    A row that fits the context takes one passage; after that, where the window slides, each step takes one of its own.
    """
    seq_indices = min(MAX_SEQS, max(1, sum(len(row.new) for row in rows)))
    most = max(MOST_TOKENS, model.config.n_positions)
    cache = model.new_cache(
        seq_indices, capacity=model.capacity_of([most, *[1] * seq_indices])
    )  # however these are shared out
    for batch in _batches(_passages(rows, model.config.n_positions)):
        tokens: list[int] = []
        token_seq_indices: list[int] = []
        positions: list[int] = []
        logits_indices: list[int] = []
        for seq_index, passage in enumerate(batch):
            length = len(passage.tokens)
            # what passages have in common before the first logits_indices step is computed once
            there = cache.allocate(
                seq_index, passage.tokens[: length - len(passage.steps) + 1], length, share=True
            )
            assert there is not None, "the cache has room for every call"
            cache.mark_computed(seq_index, there, length)
            tokens += passage.tokens[there:]
            token_seq_indices += [seq_index] * (length - there)
            positions += range(there, length)
            logits_indices += range(len(tokens) - len(passage.steps), len(tokens))
        yield (
            batch,
            model.hidden(
                cache,
                tokens=tokens,
                seq_indices=token_seq_indices,
                positions=positions,
                logits_indices=logits_indices,
            ),
        )
        for seq_index in range(len(batch)):
            cache.free(seq_index)


def each_logits(model: GPT, hidden: Tensor) -> Iterator[Tensor]:
    """hidden (S, C) -> the logits (V,) of each row, computed some at a time."""
    for some in hidden.split(HEAD_ROWS):
        yield from model.logits(some)


def _passages(rows: Sequence[KnownRow], n_positions: int) -> Iterator[Passage]:
    for index, row in enumerate(rows):
        tokens = row.prompt + row.new[:-1]  # what the last step saw
        inside = min(len(tokens), n_positions)
        first = inside - len(row.prompt) + 1  # the first step beyond the context
        yield Passage(index, tokens[:inside], range(first))
        for step in range(first, len(row.new)):
            end = len(row.prompt) + step
            yield Passage(index, tokens[end - n_positions : end], range(step, step + 1))


def _batches(passages: Iterator[Passage]) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    tokens = 0
    for passage in passages:
        tokens += len(passage.tokens)
        if batch and (len(batch) == MAX_SEQS or tokens > MOST_TOKENS):
            yield batch
            batch, tokens = [], len(passage.tokens)
        batch.append(passage)
    if batch:
        yield batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A token at a step. probability: of being drawn, 0 when it is not kept. score: logit + temperature * noise."""

    token: int
    probability: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """One step explained.

    margin: as sampling.py defines it, None in a vocabulary of one. rank: 1 for the token of the largest logit. kept: tokens that
    top-k kept. distance: how far the logits are from ones with which the token wins, 0 when it does. runners_up: the kept tokens
    of the next best scores.
    """

    step: int
    candidate: Candidate
    margin: float | None
    rank: int
    kept: int
    distance: float
    runners_up: tuple[Candidate, ...]


def explain_step(
    logits: Tensor, params: SamplingParams, step: int, token: int, *, runners_up: int = 3
) -> StepTrace:
    """Why `token` was chosen from the logits (V,) of a row at a step, or how far it is from that. The formulas of sampling.py."""
    (choice,) = sample_tokens(logits[None], [params], [step])
    logits = logits.double().cpu()
    token_ids = torch.arange(len(logits))
    scores = logits + params.temperature * gumbel(
        torch.tensor(params.seed), torch.tensor(step), token_ids
    )
    kth = torch.sort(logits, descending=True).values[
        (min(params.top_k, len(logits)) or len(logits)) - 1
    ]
    kept = logits >= kth
    kept_scores = torch.where(kept, scores, -math.inf)
    if params.temperature == 0:
        probabilities = (logits == logits.max()).double() * (token_ids == int(logits.argmax()))
    else:
        probabilities = torch.softmax(torch.where(kept, logits / params.temperature, -math.inf), 0)
    # how far the token is from being kept and from the best score among the kept
    missing = max(float(kth - logits[token]), float(kept_scores.max() - scores[token]), 0.0)
    order = [int(j) for j in kept_scores.argsort(descending=True, stable=True)[: runners_up + 1]]

    def candidate(j: int) -> Candidate:
        return Candidate(token=j, probability=float(probabilities[j]), score=float(scores[j]))

    return StepTrace(
        step=step,
        candidate=candidate(token),
        margin=choice.margin,
        rank=int((logits > logits[token]).sum()) + 1,
        kept=int(kept.sum()),
        distance=missing,
        runners_up=tuple(candidate(j) for j in order if j != token and bool(kept[j]))[:runners_up],
    )
