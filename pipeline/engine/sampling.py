"""How the next token of each row is chosen from its logits, and by how far.

    kept   = the tokens whose logit is at least the k-th largest (all ties kept; all tokens when top_k is 0 or >= V)
    score  = float64(logit) + temperature * g, with g the noise of (row seed, step, token id)
    winner = the kept token of the largest score, ties to the smallest id

With Gumbel noise this draws from softmax(logits / temperature) over the kept tokens (Maddison, Tarlow and Minka, "A*
sampling", NeurIPS 2014); temperature 0 is the same formula and greedy. Rows do not know each other.

The margin of a choice says how far it is from another one under other rounding, in logit units: the smallest of
    score(winner) - the best other kept score                  another kept token would win
    logit(winner) - the largest logit that was not kept        the winner would not be kept
    k-th largest logit - logit(j)                              for each j that was not kept and whose score is above the winner's
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbatch.pipeline.engine.noise import gumbel
from gptbatch.pipeline.types import SamplingParams

MOST_SCORES = (
    2**18
)  # computed at a time where the whole vocabulary is kept: what fits the caches of a CPU
LISTED = 32  # tokens listed beyond the k likeliest, for ties with the last kept and for margins


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of a row. token is None when the logits hold NaN or +inf (or nothing but -inf); margin is None then, and
    when there is only one token in the vocabulary."""

    token: int | None
    margin: float | None


def sample_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    steps: Sequence[int],
    bounds: Sequence[float] | None = None,
    *,
    native: bool = False,
) -> list[SampledToken]:
    """The next token of each row.

    logits (B, V) of any floating type; params and steps (the index of the new token in its row), one each a row. A margin
    above its row's bound may come out as the bound, which saves looking for it: give the row's smallest margin so far.
    native: by our kernel (sample.cpp), on a CPU. Its logarithms may differ from torch's in their last bit, and so may margins.
    """
    device, vocab_size = logits.device, logits.shape[1]
    if not params:
        return []
    rows = _Rows(
        seeds=torch.tensor([p.seed for p in params], device=device),
        steps=torch.tensor(list(steps), device=device),
        temperatures=torch.tensor(
            [p.temperature for p in params], dtype=torch.float64, device=device
        ),
        bounds=torch.tensor(
            [math.inf] * len(params) if bounds is None else list(bounds),
            dtype=torch.float64,
            device=device,
        ),
    )
    kept_counts = [kept_set_size(p, vocab_size) for p in params]
    if native:
        winners, margins = torch.ops.gptbatch.sample(
            logits,
            rows.seeds,
            rows.steps,
            rows.temperatures,
            torch.tensor(kept_counts),
            rows.bounds,
        )
    else:
        winners, margins = _choose(logits, kept_counts, rows)
    return [
        SampledToken(token, margin if vocab_size > 1 else None)
        if token >= 0
        else SampledToken(None, None)
        for token, margin in zip(winners.tolist(), margins.tolist(), strict=True)
    ]


def kept_set_size(params: SamplingParams, vocab_size: int) -> int:
    """How many tokens are kept besides ties. Greedy draws no noise that matters: only those at the largest logit can win."""
    return 1 if params.temperature == 0 else min(params.top_k, vocab_size) or vocab_size


def _choose(logits: Tensor, kept_counts: list[int], rows: _Rows) -> tuple[Tensor, Tensor]:
    """Winners, -1 where the logits are not finite, and margins (B,): what the kernel does, in terms of torch, for every device."""
    batch, vocab_size = logits.shape
    finite = torch.isfinite(logits.amax(dim=1))
    winners = torch.zeros_like(rows.seeds)
    margins = torch.zeros_like(rows.temperatures)
    few = [row for row, count in enumerate(kept_counts) if count < vocab_size]
    if few:
        counts = torch.tensor([kept_counts[row] for row in few], device=logits.device)
        if len(few) == batch:
            winners, margins = _choose_among_few(logits, counts, rows)
        else:
            index = torch.tensor(few, device=logits.device)
            winners[index], margins[index] = _choose_among_few(logits[index], counts, rows[index])
    whole = [row for row, count in enumerate(kept_counts) if count == vocab_size]
    for chunk in _chunks(whole, max(1, MOST_SCORES // vocab_size)):
        index = torch.tensor(chunk, device=logits.device)
        winners[index], margins[index] = _choose_among_all(logits[index], rows[index])
    return torch.where(finite, winners, -1), margins


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What chooses besides the logits, (B,) each."""

    seeds: Tensor
    steps: Tensor
    temperatures: Tensor
    bounds: Tensor

    def __getitem__(self, index: Tensor) -> _Rows:
        return _Rows(
            seeds=self.seeds[index],
            steps=self.steps[index],
            temperatures=self.temperatures[index],
            bounds=self.bounds[index],
        )

    def scores(self, logits: Tensor, where: Tensor, token_ids: Tensor) -> Tensor:
        """Of the tokens token_ids (E,) of the rows where (E,)."""
        noise = gumbel(self.seeds[where], self.steps[where], token_ids)
        return logits[where, token_ids].double() + self.temperatures[where] * noise


def _choose_among_few(logits: Tensor, counts: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Winners and margins (B,). counts (B,), each below V: a row keeps as many tokens, and all ties."""
    batch, vocab_size = logits.shape
    listed = torch.topk(logits, min(int(counts.max()) + LISTED, vocab_size), dim=1)
    kth = listed.values.gather(1, counts[:, None] - 1)
    where, token_ids = _at_least(logits, listed.values, listed.indices, kth)
    scores = rows.scores(logits, where, token_ids)
    best = _largest(scores, where, batch)
    candidates = torch.where(scores == best[where], token_ids, vocab_size)
    winners = torch.full((batch,), vocab_size, device=logits.device).scatter_reduce(
        0, where, candidates, "amin"
    )
    winners = winners.clamp(max=vocab_size - 1)  # a row of NaN has none

    second = _largest(torch.where(token_ids == winners[where], -math.inf, scores), where, batch)
    values = listed.values if bool((listed.values[:, -1:] < kth).all()) else logits
    outside = torch.where(values < kth, values, -math.inf).amax(dim=1).double()
    winning = logits.gather(1, winners[:, None])[:, 0].double()
    margins = torch.minimum(torch.minimum(best - second, winning - outside), rows.bounds)

    # a token that was not kept can lower the margin only from nearer the k-th than that
    kth = kth.double()
    where, token_ids = _at_least(logits, listed.values, listed.indices, kth - margins[:, None])
    near = logits[where, token_ids].double()
    not_kept = near < kth[where, 0]
    where, token_ids, near = where[not_kept], token_ids[not_kept], near[not_kept]
    beats = rows.scores(logits, where, token_ids) > best[where]
    distances = torch.where(beats, kth[where, 0] - near, math.inf)
    return winners, margins.scatter_reduce(0, where, distances, "amin")


def _choose_among_all(logits: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Winners and margins (B,), every token kept."""
    token_ids = torch.arange(logits.shape[1], device=logits.device)
    scores = logits.double() + rows.temperatures[:, None] * gumbel(
        rows.seeds[:, None], rows.steps[:, None], token_ids[None]
    )
    winners = scores.argmax(dim=1, keepdim=True)
    best = scores.gather(1, winners)
    second = scores.scatter(1, winners, -math.inf).amax(dim=1)
    return winners[:, 0], best[:, 0] - second


def _at_least(
    logits: Tensor, largest: Tensor, largest_ids: Tensor, floor: Tensor
) -> tuple[Tensor, Tensor]:
    """(row, token id) of every logit of at least floor (B, 1); largest and largest_ids (B, K) list the largest ones of each row."""
    if largest.shape[1] == logits.shape[1] or bool((largest[:, -1:] < floor).all()):
        where, rank = torch.nonzero(largest >= floor, as_tuple=True)
        return where, largest_ids[where, rank]
    return torch.nonzero(logits >= floor, as_tuple=True)  # type: ignore[return-value]


def _largest(values: Tensor, where: Tensor, batch: int) -> Tensor:
    """(B,): the largest of the values of each row, -inf for none."""
    return torch.full(
        (batch,), -math.inf, dtype=torch.float64, device=values.device
    ).scatter_reduce(0, where, values, "amax")


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
