"""Sample the next token of each row from its logits, and measure how safe the result is.

    kept   = the tokens whose logit is at least the k-th largest: ties are kept, and every token if
             top_k is 0 or at least V
    score  = float64(logit) + temperature * g, with g the noise of (row seed, step, token id)
    token  = the kept token with the largest score; the smallest id among ties

With Gumbel noise this samples from softmax(logits / temperature) over the kept set (Maddison,
Tarlow and Minka, "A* sampling", NeurIPS 2014). Temperature 0 is greedy by the same formula. A row's
token does not depend on other rows.

The decision margin of a step tells how close it was to another token. It is a distance in logits:
if every logit changes by less than half of it, the same token wins. With `reach(t)`, the least
distance at which token t enters or leaves the kept set, it is the smallest of

    score(token) - score(i)                    kept token i would win: for each i besides the token
    reach(token)                               the token would not be kept
    max(reach(j), score(token) - score(j))     token j would be kept and win: for each j outside

For top_k, with the logits sorted as v_1 >= v_2 >= ... and ties counted one by one,

    reach(t) = logit(t) - v_(k+1)     of a kept token, so 0 where it ties with the k-th and the next
    reach(j) = v_k - logit(j)         of a token outside
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbatch.pipeline.engine.noise import gumbel
from gptbatch.pipeline.types import SamplingParams

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
    """

    token: int | None
    decision_margin: float | None


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
        margin_bounds=torch.tensor(list(margin_bounds), dtype=torch.float64, device=device),
    )
    kept_sizes = [kept_set_size(p, vocab_size) for p in params]
    if native:
        tokens, margins = torch.ops.gptbatch.sample(
            logits,
            rows.seeds,
            rows.steps,
            rows.temperatures,
            torch.tensor(kept_sizes),
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
    """Return how many tokens can win, ties aside: only the largest logit if temperature is 0."""
    return 1 if params.temperature == 0 else top_k_size(params, vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSet:
    """The kept set of each row.

    Attributes:
        logits: (S, V).
        top_values: The K largest logits of each row (S, K), K > k where V allows it.
        top_ids: Their token ids (S, K).
        kth: The k-th largest logit of each row (S, 1).
        next_largest: The one after it, which may be equal (S, 1); -inf where k is V.
    """

    logits: Tensor
    top_values: Tensor
    top_ids: Tensor
    kth: Tensor
    next_largest: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Return (row, token id) of every kept token, (E,) each."""
        return self.at_least(self.kth)

    def at_least(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row, token id) of every logit of at least threshold (S, 1), (E,) each."""
        if self._lists_all(threshold):
            rows, rank = torch.nonzero(self.top_values >= threshold, as_tuple=True)
            return rows, self.top_ids[rows, rank]
        return torch.nonzero(self.logits >= threshold, as_tuple=True)  # type: ignore[return-value]

    def _lists_all(self, threshold: Tensor) -> bool:
        """Return whether the listed logits include all that reach the threshold."""
        has_all = self.top_values.shape[1] == self.logits.shape[1]
        return has_all or bool((self.top_values[:, -1:] < threshold).all())


def kept_set(logits: Tensor, kept_sizes: Tensor) -> KeptSet:
    """Find the kept set of each row.

    Args:
        logits: (S, V).
        kept_sizes: k of each row (S,), 1 to V; ties with the k-th largest logit are kept too.
    """
    vocab_size = logits.shape[1]
    count = min(int(kept_sizes.max()) + EXTRA_TOP_TOKENS, vocab_size)
    top = torch.topk(logits, count, dim=1)
    is_all = (kept_sizes >= vocab_size)[:, None]
    following = top.values.gather(1, kept_sizes.clamp(max=vocab_size - 1)[:, None])
    return KeptSet(
        logits=logits,
        top_values=top.values,
        top_ids=top.indices,
        kth=top.values.gather(1, kept_sizes[:, None] - 1),
        next_largest=torch.where(is_all, -math.inf, following),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What decides a row's token besides its logits, (S,) each."""

    seeds: Tensor
    steps: Tensor
    temperatures: Tensor
    margin_bounds: Tensor

    def __getitem__(self, index: Tensor) -> _Rows:
        return _Rows(
            seeds=self.seeds[index],
            steps=self.steps[index],
            temperatures=self.temperatures[index],
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
    top_k_rows = [row for row, count in enumerate(kept_sizes) if count < vocab_size]
    if top_k_rows:
        top_k_sizes = torch.tensor([kept_sizes[row] for row in top_k_rows], device=device)
        if len(top_k_rows) == batch:
            tokens, margins = _sample_from_kept(logits, top_k_sizes, rows)
        else:
            index = torch.tensor(top_k_rows, device=device)
            tokens[index], margins[index] = _sample_from_kept(
                logits[index], top_k_sizes, rows[index]
            )
    full_vocab_rows = [row for row, count in enumerate(kept_sizes) if count == vocab_size]
    for piece in _pieces(full_vocab_rows, max(1, MAX_SCORES // vocab_size)):
        index = torch.tensor(piece, device=device)
        tokens[index], margins[index] = _sample_from_all(logits[index], rows[index])
    return torch.where(is_finite, tokens, -1), margins


def _sample_from_kept(logits: Tensor, kept_sizes: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return tokens and margins (S,) of rows that keep kept_sizes (S,) < V tokens."""
    batch, vocab_size = logits.shape
    kept = kept_set(logits, kept_sizes)
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
    reach = winning - kept.next_largest[:, 0].double()
    margins = torch.minimum(torch.minimum(best - second, reach), rows.margin_bounds)
    return tokens, torch.minimum(margins, _outside_distances(kept, rows, best, margins))


def _outside_distances(kept: KeptSet, rows: _Rows, best: Tensor, margins: Tensor) -> Tensor:
    """Return the smallest max(reach(j), score(token) - score(j)) over tokens j outside, (S,).

    Only tokens nearer to the k-th logit than `margins` are examined; infinity for none.
    """
    logits, kth = kept.logits, kept.kth.double()
    row_ids, token_ids = kept.at_least(kth - margins[:, None])
    near = logits[row_ids, token_ids].double()
    is_outside = near < kth[row_ids, 0]
    row_ids, token_ids, near = row_ids[is_outside], token_ids[is_outside], near[is_outside]
    to_win = best[row_ids] - rows.scores(logits, row_ids, token_ids)
    distances = torch.maximum(kth[row_ids, 0] - near, to_win)
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
