"""Sample the next token of each row from its logits, and measure how safe the result is.

    kept   = the tokens whose logit is at least the k-th largest: ties are kept, and every token if
             top_k is 0 or at least V
    score  = float64(logit) + temperature * g, with g the noise of (row seed, step, token id)
    token  = the kept token with the largest score; the smallest id among ties

With Gumbel noise this samples from softmax(logits / temperature) over the kept set (Maddison,
Tarlow and Minka, "A* sampling", NeurIPS 2014). Temperature 0 is greedy by the same formula. A row's
token does not depend on other rows.

The decision margin of a step tells how close it was to another token. It is a distance in logits:
how much the difference of two logits must change before another token wins. It is the smallest of
three distances:

    score(token) - the second largest score in the kept set    another kept token would win
    logit(token) - the largest logit outside the kept set      the token would not be kept
    k-th largest logit - logit(j)                              token j would be kept and win: for
                                                               each j outside with a larger score
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    params: Sequence[SamplingParams],
    steps: Sequence[int],
    bounds: Sequence[float] | None = None,
    *,
    native: bool = False,
) -> list[SampledToken]:
    """Sample the next token of each row.

    Args:
        logits: (B, V) of any floating dtype.
        params: Sampling parameters of each row.
        steps: Index of the new token in each row, from 0.
        bounds: A decision margin above the row's bound may be returned as the bound, which is
            faster. Pass the row's smallest margin so far. None is infinity.
        native: Use the C++ kernel (CPU only). Its logarithms may differ from torch's in the last
            bit, and so may decision margins.
    """
    device, vocab_size = logits.device, logits.shape[1]
    if not params:
        return []
    bounds = [math.inf] * len(params) if bounds is None else bounds
    temperatures = [p.temperature for p in params]
    rows = _Rows(
        seeds=torch.tensor([p.seed for p in params], device=device),
        steps=torch.tensor(list(steps), device=device),
        temperatures=torch.tensor(temperatures, dtype=torch.float64, device=device),
        bounds=torch.tensor(list(bounds), dtype=torch.float64, device=device),
    )
    kept_counts = [kept_set_size(p, vocab_size) for p in params]
    if native:
        tokens, margins = torch.ops.gptbatch.sample(
            logits,
            rows.seeds,
            rows.steps,
            rows.temperatures,
            torch.tensor(kept_counts),
            rows.bounds,
        )
    else:
        tokens, margins = _sample(logits, kept_counts, rows)
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
        logits: (B, V).
        top_values: The K largest logits of each row (B, K), K > k where V allows it.
        top_ids: Their token ids (B, K).
        kth: The k-th largest logit of each row (B, 1).
    """

    logits: Tensor
    top_values: Tensor
    top_ids: Tensor
    kth: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Return (row, token id) of every kept token, (E,) each."""
        return self.at_least(self.kth)

    def at_least(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row, token id) of every logit of at least threshold (B, 1), (E,) each."""
        if self._lists_all(threshold):
            rows, rank = torch.nonzero(self.top_values >= threshold, as_tuple=True)
            return rows, self.top_ids[rows, rank]
        return torch.nonzero(self.logits >= threshold, as_tuple=True)  # type: ignore[return-value]

    def largest_outside(self) -> Tensor:
        """Return the largest logit outside the kept set, (B,); -inf for none."""
        lists_outside = bool((self.top_values[:, -1:] < self.kth).all())
        values = self.top_values if lists_outside else self.logits
        return torch.where(values < self.kth, values, -math.inf).amax(dim=1)

    def _lists_all(self, threshold: Tensor) -> bool:
        """Return whether the listed logits include all that reach the threshold."""
        has_all = self.top_values.shape[1] == self.logits.shape[1]
        return has_all or bool((self.top_values[:, -1:] < threshold).all())


def kept_set(logits: Tensor, sizes: Tensor) -> KeptSet:
    """Find the kept set of each row.

    Args:
        logits: (B, V).
        sizes: k of each row (B,), 1 to V; ties with the k-th largest logit are kept too.
    """
    count = min(int(sizes.max()) + EXTRA_TOP_TOKENS, logits.shape[1])
    top = torch.topk(logits, count, dim=1)
    return KeptSet(
        logits=logits,
        top_values=top.values,
        top_ids=top.indices,
        kth=top.values.gather(1, sizes[:, None] - 1),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What decides a row's token besides its logits, (B,) each."""

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

    def scores(self, logits: Tensor, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Return the scores of E tokens; rows and token_ids are (E,)."""
        noise = gumbel(self.seeds[rows], self.steps[rows], token_ids)
        return logits[rows, token_ids].double() + self.temperatures[rows] * noise


def _sample(logits: Tensor, kept_counts: list[int], rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return tokens (B,), -1 for logits that are not finite, and margins (B,): torch only."""
    batch, vocab_size = logits.shape
    device = logits.device
    is_finite = torch.isfinite(logits.amax(dim=1))
    tokens = torch.zeros_like(rows.seeds)
    margins = torch.zeros_like(rows.temperatures)
    sampled_rows = [row for row, count in enumerate(kept_counts) if count < vocab_size]
    if sampled_rows:
        sizes = torch.tensor([kept_counts[row] for row in sampled_rows], device=device)
        if len(sampled_rows) == batch:
            tokens, margins = _sample_from_kept(logits, sizes, rows)
        else:
            index = torch.tensor(sampled_rows, device=device)
            tokens[index], margins[index] = _sample_from_kept(logits[index], sizes, rows[index])
    full_vocab_rows = [row for row, count in enumerate(kept_counts) if count == vocab_size]
    for piece in _pieces(full_vocab_rows, max(1, MAX_SCORES // vocab_size)):
        index = torch.tensor(piece, device=device)
        tokens[index], margins[index] = _sample_from_all(logits[index], rows[index])
    return torch.where(is_finite, tokens, -1), margins


def _sample_from_kept(logits: Tensor, sizes: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return tokens and margins (B,) of rows that keep sizes (B,) < V tokens."""
    batch, vocab_size = logits.shape
    kept = kept_set(logits, sizes)
    where, token_ids = kept.tokens()
    scores = rows.scores(logits, where, token_ids)
    best = _max_per_row(scores, where, batch)
    candidates = torch.where(scores == best[where], token_ids, vocab_size)
    tokens = torch.full((batch,), vocab_size, device=logits.device).scatter_reduce(
        0, where, candidates, "amin"
    )
    # Rows of NaN have no candidate.
    tokens = tokens.clamp(max=vocab_size - 1)
    others = torch.where(token_ids == tokens[where], -math.inf, scores)
    second = _max_per_row(others, where, batch)
    winning = logits.gather(1, tokens[:, None])[:, 0].double()
    outside = kept.largest_outside().double()
    margins = torch.minimum(torch.minimum(best - second, winning - outside), rows.bounds)
    return tokens, torch.minimum(margins, _outside_distances(kept, rows, best, margins))


def _outside_distances(kept: KeptSet, rows: _Rows, best: Tensor, margins: Tensor) -> Tensor:
    """Return the smallest k-th logit - logit(j) over tokens j outside that would win, (B,).

    Only tokens nearer to the k-th logit than `margins` are examined; infinity for none.
    """
    logits, kth = kept.logits, kept.kth.double()
    where, token_ids = kept.at_least(kth - margins[:, None])
    near = logits[where, token_ids].double()
    is_outside = near < kth[where, 0]
    where, token_ids, near = where[is_outside], token_ids[is_outside], near[is_outside]
    would_win = rows.scores(logits, where, token_ids) > best[where]
    distances = torch.where(would_win, kth[where, 0] - near, math.inf)
    smallest = torch.full_like(margins, math.inf)
    return smallest.scatter_reduce(0, where, distances, "amin")


def _sample_from_all(logits: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Return tokens and margins (B,) of rows that keep the full vocabulary."""
    token_ids = torch.arange(logits.shape[1], device=logits.device)
    noise = gumbel(rows.seeds[:, None], rows.steps[:, None], token_ids[None])
    scores = logits.double() + rows.temperatures[:, None] * noise
    tokens = scores.argmax(dim=1, keepdim=True)
    best = scores.gather(1, tokens)
    second = scores.scatter(1, tokens, -math.inf).amax(dim=1)
    return tokens[:, 0], best[:, 0] - second


def _max_per_row(values: Tensor, where: Tensor, batch: int) -> Tensor:
    """Return the largest value of each row, (batch,); where (E,) is the row of each value."""
    smallest = torch.full((batch,), -math.inf, dtype=torch.float64, device=values.device)
    return smallest.scatter_reduce(0, where, values, "amax")


def _pieces(rows: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
