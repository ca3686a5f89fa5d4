"""Sample the next token of each row from its logits, and measure how safe the result is.

    kept   = the tokens with logit >= cutoff: ties are kept. The cutoff is the largest of
                 top_k    the k-th largest logit; none if top_k is 0 or at least V
                 top_p    the smallest logit of the most likely tokens that hold top_p of the mass
                          of those that top_k keeps (see nucleus.py); none if top_p is 1
                 min_p    the largest logit + temperature * ln(min_p); none if min_p is 0
    score  = float64(logit) + temperature * g, with g the noise of (row seed, step, token id)
    token  = the kept token with the largest score; the smallest id among ties

With Gumbel noise this samples from softmax(logits / temperature) over the kept set (Maddison,
Tarlow and Minka, "A* sampling", NeurIPS 2014). Temperature 0 is greedy by the same formula; top_k,
top_p and min_p do not matter then. A row's token does not depend on other rows.

The decision margin of a step tells how close it was to another token. It is a distance in logits:
if every logit changes by less than half of it, the same token wins. With `reach(t)`, the least
distance at which token t enters or leaves the kept set, it is the smallest of

    score(token) - score(i)                    kept token i would win: for each i besides the token
    reach(token)                               the token would not be kept
    max(reach(j), score(token) - score(j))     token j would be kept and win: for each j outside

With the logits sorted as v_1 >= v_2 >= ... and ties counted one by one,

    reach(t) = logit(t) - v_(k+1)      of a kept token, for top_k; 0 for ties with v_(k+1)
    reach(t) = logit(t) - (the largest other logit + temperature * ln(min_p))    for min_p
    reach(j) = cutoff - logit(j)       of a token outside, for both

and for top_p as in nucleus.py. A kept token needs all filters, so the smallest reach counts. A
token outside needs those that leave it out, so the largest counts.
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbatch.pipeline.engine.logarithm import log
from gptbatch.pipeline.engine.noise import gumbel
from gptbatch.pipeline.engine.nucleus import Nucleus, find_nucleus
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import TokenLogprobs

# Scores computed at once for rows that keep the full vocabulary: they fit the caches of a CPU.
MAX_SCORES = 2**18
# Largest logits that are listed beyond the k-th, for ties and decision margins.
EXTRA_TOP_TOKENS = 32


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of a row.

    Attributes:
        token: None if the logits hold NaN or +inf, or nothing but -inf.
        decision_margin: See above. None without a token, and in a vocabulary of one.
        is_forbidden: The row's settings forbid every token.
        logprobs: Of the token; None where the row does not request them.
    """

    token: int | None
    decision_margin: float | None
    is_forbidden: bool = False
    logprobs: TokenLogprobs | None = None


def sample_tokens(
    logits: Tensor,
    params: abc.Sequence[SamplingParams],
    steps: abc.Sequence[int],
    margin_bounds: abc.Sequence[float] | None = None,
    *,
    native: bool = False,
) -> list[SampledToken]:
    """Sample the next token of each row.

    Args:
        logits: (S, V) of any floating dtype.
        params: Sampling parameters of each row.
        steps: Index of the new token in each row, from 0.
        margin_bounds: A decision margin above the row's bound may be returned as the bound, which
            is faster. Pass the row's smallest margin so far. None is infinity.
        native: Use the C++ kernel (CPU only). Its logarithms may differ from torch's in the last
            bit, and so may decision margins.
    """
    device, vocab_size = logits.device, logits.shape[1]
    if not params:
        return []
    margin_bounds = [math.inf] * len(params) if margin_bounds is None else margin_bounds
    temperatures = [p.temperature for p in params]
    rows = _Rows(
        seeds=torch.tensor([p.seed for p in params], device=device),
        steps=torch.tensor(list(steps), device=device),
        temperatures=torch.tensor(temperatures, dtype=torch.float64, device=device),
        kept_ranges=torch.tensor(
            [kept_range(p) for p in params], dtype=torch.float64, device=device
        ),
        top_ps=torch.tensor(
            [p.top_p if p.temperature > 0 else 1.0 for p in params],
            dtype=torch.float64,
            device=device,
        ),
        margin_bounds=torch.tensor(list(margin_bounds), dtype=torch.float64, device=device),
    )
    kept_sizes = [kept_set_size(p, vocab_size) for p in params]
    if native:
        tokens, margins = torch.ops.gptbatch.sample(
            logits.contiguous(),
            rows.seeds,
            rows.steps,
            rows.temperatures,
            torch.tensor(kept_sizes),
            rows.kept_ranges,
            rows.top_ps,
            rows.margin_bounds,
        )
    else:
        tokens, margins = _sample(logits, kept_sizes, rows)
    return [
        SampledToken(token, margin if vocab_size > 1 else None)
        if token >= 0
        else SampledToken(None, None)
        for token, margin in zip(tokens.tolist(), margins.tolist(), strict=True)
    ]


def top_k_size(params: SamplingParams, vocab_size: int) -> int:
    """Return how many tokens top-k keeps, ties aside: 1 to V."""
    return min(params.top_k, vocab_size) or vocab_size


def kept_set_size(params: SamplingParams, vocab_size: int) -> int:
    """Return how many tokens can win, ties aside: only the largest logit if temperature is 0.

    top_p and min_p may leave fewer.
    """
    return 1 if params.temperature == 0 else top_k_size(params, vocab_size)


def kept_range(params: SamplingParams) -> float:
    """Return how far below the largest logit min_p keeps tokens; infinity where it keeps all."""
    if params.temperature == 0 or params.min_p == 0:
        return math.inf
    return -params.temperature * log(params.min_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSet:
    """The kept set of each row.

    Attributes:
        logits: (S, V).
        top_values: The K largest logits of each row (S, K), K > k where V allows it.
        top_ids: Their token ids (S, K).
        cutoff: A token is kept if its logit is at least this, (S, 1) float64.
        base_cutoff: The cutoff of top_k and min_p alone.
        nucleus: Of the rows with top_p; None without any.
        nucleus_rows: Their indices (R,).
        next_largest: The (k+1)-th largest logit, (S, 1) float64; -inf without top_k.
        kept_ranges: How far below the largest logit min_p keeps tokens, (S,) float64.
    """

    logits: Tensor
    top_values: Tensor
    top_ids: Tensor
    cutoff: Tensor
    base_cutoff: Tensor
    nucleus: Nucleus | None
    nucleus_rows: Tensor
    next_largest: Tensor
    kept_ranges: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Return (row, token id) of every kept token, (E,) each."""
        return self.at_least(self.cutoff)

    def at_least(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row, token id) of every logit of at least threshold (S, 1), (E,) each."""
        if self._lists_all(threshold):
            rows, rank = torch.nonzero(self.top_values >= threshold, as_tuple=True)
            return rows, self.top_ids[rows, rank]
        return torch.nonzero(self.logits >= threshold, as_tuple=True)  # type: ignore[return-value]

    def reach(self, logits: Tensor) -> Tensor:
        """Return the reach of one kept token per row, by its logit (S,) float64."""
        largest = self.top_values[:, :2].double()
        # In a vocabulary of one there is no other logit, and no margin.
        is_largest = logits == largest[:, 0]
        largest_other = torch.where(is_largest, largest[:, -1], largest[:, 0])
        reach = torch.minimum(
            logits - self.next_largest[:, 0], logits - (largest_other - self.kept_ranges)
        )
        if self.nucleus is not None:
            rows = self.nucleus_rows
            reach[rows] = torch.minimum(reach[rows], self.nucleus.reach_of_kept(logits[rows]))
        return reach

    def _lists_all(self, threshold: Tensor) -> bool:
        """Return whether the listed logits include all that reach the threshold."""
        has_all = self.top_values.shape[1] == self.logits.shape[1]
        return has_all or bool((self.top_values[:, -1:] < threshold).all())


def kept_set(
    logits: Tensor,
    kept_sizes: Tensor,
    kept_ranges: Tensor,
    top_ps: Tensor,
    temperatures: Tensor,
) -> KeptSet:
    """Find the kept set of each row.

    Args:
        logits: (S, V).
        kept_sizes: k of each row (S,), 1 to V; ties with the k-th largest logit are kept too.
        kept_ranges: How far below the largest logit tokens are kept (S,) float64.
        top_ps: (S,) float64, 1 where the temperature is 0.
        temperatures: (S,) float64.
    """
    vocab_size = logits.shape[1]
    has_k = kept_sizes < vocab_size
    ranks = torch.where(has_k, kept_sizes, 1)
    top = torch.topk(logits, min(int(ranks.max()) + EXTRA_TOP_TOKENS, vocab_size), dim=1)

    def ranked(rank: Tensor) -> Tensor:
        """Return the logit of a rank from 0 in each row with a k; -inf in others, (S, 1)."""
        values = top.values.gather(1, rank.clamp(max=vocab_size - 1)[:, None]).double()
        return torch.where(has_k[:, None], values, -math.inf)

    range_cutoff = top.values[:, :1].double() - kept_ranges[:, None]
    kth = ranked(ranks - 1)
    cutoff = base_cutoff = torch.maximum(kth, range_cutoff)
    index = torch.nonzero(top_ps < 1)[:, 0]
    nucleus = None
    if len(index):
        nucleus = find_nucleus(logits[index], kth[index], temperatures[index], top_ps[index])
        cutoff = cutoff.clone()
        cutoff[index] = torch.maximum(cutoff[index], nucleus.cutoff())
    return KeptSet(
        logits=logits,
        top_values=top.values,
        top_ids=top.indices,
        cutoff=cutoff,
        base_cutoff=base_cutoff,
        nucleus=nucleus,
        nucleus_rows=index,
        next_largest=ranked(ranks),
        kept_ranges=kept_ranges,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What decides a row's token besides its logits, (S,) each."""

    seeds: Tensor
    steps: Tensor
    temperatures: Tensor
    kept_ranges: Tensor
    top_ps: Tensor
    margin_bounds: Tensor

    def __getitem__(self, index: Tensor) -> _Rows:
        return _Rows(
            seeds=self.seeds[index],
            steps=self.steps[index],
            temperatures=self.temperatures[index],
            kept_ranges=self.kept_ranges[index],
            top_ps=self.top_ps[index],
            margin_bounds=self.margin_bounds[index],
        )

    def scores(self, logits: Tensor, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Return the scores of E tokens; rows and token_ids are (E,)."""
        noise = gumbel(self.seeds[rows], self.steps[rows], token_ids)
        return logits[rows, token_ids].double() + self.temperatures[rows] * noise


def _sample(logits: Tensor, kept_sizes: list[int], rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return tokens (S,), -1 for logits that are not finite, and margins (S,): torch only."""
    batch, vocab_size = logits.shape
    device = logits.device
    is_finite = torch.isfinite(logits.amax(dim=1))
    tokens = torch.zeros_like(rows.seeds)
    margins = torch.zeros_like(rows.temperatures)
    # Rows that keep the full vocabulary need no list of kept tokens.
    keeps_all = [
        count == vocab_size and math.isinf(kept_range) and top_p == 1
        for count, kept_range, top_p in zip(
            kept_sizes, rows.kept_ranges.tolist(), rows.top_ps.tolist(), strict=True
        )
    ]
    filtered_rows = [row for row in range(batch) if not keeps_all[row]]
    if filtered_rows:
        sizes = torch.tensor([kept_sizes[row] for row in filtered_rows], device=device)
        if len(filtered_rows) == batch:
            tokens, margins = _sample_from_kept(logits, sizes, rows)
        else:
            index = torch.tensor(filtered_rows, device=device)
            tokens[index], margins[index] = _sample_from_kept(logits[index], sizes, rows[index])
    full_vocab_rows = [row for row in range(batch) if keeps_all[row]]
    for piece in _pieces(full_vocab_rows, max(1, MAX_SCORES // vocab_size)):
        index = torch.tensor(piece, device=device)
        tokens[index], margins[index] = _sample_from_all(logits[index], rows[index])
    return torch.where(is_finite, tokens, -1), margins


def _sample_from_kept(logits: Tensor, kept_sizes: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return tokens and margins (S,) of rows that keep some of the tokens."""
    batch, vocab_size = logits.shape
    kept = kept_set(logits, kept_sizes, rows.kept_ranges, rows.top_ps, rows.temperatures)
    row_ids, token_ids = kept.tokens()
    scores = rows.scores(logits, row_ids, token_ids)
    best = _max_per_row(scores, row_ids, batch)
    candidates = torch.where(scores == best[row_ids], token_ids, vocab_size)
    tokens = torch.full((batch,), vocab_size, device=logits.device).scatter_reduce(
        0, row_ids, candidates, "amin"
    )
    # Rows of NaN have no candidate.
    tokens = tokens.clamp(max=vocab_size - 1)
    others = torch.where(token_ids == tokens[row_ids], -math.inf, scores)
    second = _max_per_row(others, row_ids, batch)
    winning = logits.gather(1, tokens[:, None])[:, 0].double()
    reach = kept.reach(winning)
    margins = torch.minimum(torch.minimum(best - second, reach), rows.margin_bounds)
    return tokens, torch.minimum(margins, _outside_distances(kept, rows, best, margins))


def _outside_distances(kept: KeptSet, rows: _Rows, best: Tensor, margins: Tensor) -> Tensor:
    """Return the smallest max(reach(j), score(token) - score(j)) over tokens j outside, (S,).

    Only tokens whose reach may be below `margins` are examined; infinity for none.
    """
    logits, cutoff = kept.logits, kept.cutoff
    lowest = cutoff - margins[:, None]
    if kept.nucleus is not None:
        index = kept.nucleus_rows
        lowest[index] = torch.minimum(lowest[index], kept.nucleus.lowest(margins[index]))
    row_ids, token_ids = kept.at_least(lowest)
    near = logits[row_ids, token_ids].double()
    # A logit of -inf never wins.
    is_outside = (near < cutoff[row_ids, 0]) & (near > -math.inf)
    row_ids, token_ids, near = row_ids[is_outside], token_ids[is_outside], near[is_outside]
    to_win = best[row_ids] - rows.scores(logits, row_ids, token_ids)
    reach = (kept.base_cutoff[row_ids, 0] - near).clamp(min=0)
    if kept.nucleus is not None:
        place = torch.full((len(logits),), -1, device=logits.device)
        place[kept.nucleus_rows] = torch.arange(len(kept.nucleus_rows), device=logits.device)
        is_left_out = place[row_ids] >= 0
        is_left_out &= near < kept.nucleus.cutoff()[place[row_ids].clamp(min=0), 0]
        is_left_out &= to_win < margins[row_ids]
        reach[is_left_out] = torch.maximum(
            reach[is_left_out],
            kept.nucleus.reach_of_outside(place[row_ids[is_left_out]], near[is_left_out]),
        )
    distances = torch.maximum(reach, to_win)
    smallest = torch.full_like(margins, math.inf)
    return smallest.scatter_reduce(0, row_ids, distances, "amin")


def _sample_from_all(logits: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return tokens and margins (S,) of rows that keep the full vocabulary."""
    token_ids = torch.arange(logits.shape[1], device=logits.device)
    noise = gumbel(rows.seeds[:, None], rows.steps[:, None], token_ids[None])
    scores = logits.double() + rows.temperatures[:, None] * noise
    tokens = scores.argmax(dim=1, keepdim=True)
    best = scores.gather(1, tokens)
    second = scores.scatter(1, tokens, -math.inf).amax(dim=1)
    return tokens[:, 0], best[:, 0] - second


def _max_per_row(values: Tensor, row_ids: Tensor, batch: int) -> Tensor:
    """Return the largest value of each row, (batch,); row_ids (E,) is the row of each value."""
    smallest = torch.full((batch,), -math.inf, dtype=torch.float64, device=values.device)
    return smallest.scatter_reduce(0, row_ids, values, "amax")


def _pieces(rows: list[int], size: int) -> abc.Iterator[list[int]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
