"""The logits of one step, small enough for a report, and enough to sample it with other settings.

50,257 logits take 200 KB per step. A step table takes about 5 KB:

    levels    the 512 largest logits, as distinct values with counts
    segments  the other logits: sums over consecutive tokens
    tokens    the 20 most likely tokens, and every token that can win or come second

A filter keeps the first tokens in the order of their logits z. With noise g, token j beats a token
i before it if temperature * (g_j - g_i) > z_i - z_j >= 0. If that is true at one temperature, it is
true at every higher one. So the tokens that win with some filter, at some temperature up to T, are
those that beat all tokens before them at T: about ln(V) + 1 of them. The tokens that come second
are beaten by one at most.

top_p needs sums of f(z) = exp(z / temperature) over the tokens before a place. In a segment, f is
interpolated at Chebyshev nodes x_i (Trefethen, "Approximation Theory and Approximation Practice",
2013), with the same weights at every temperature:

    sum of f(z) over tokens = sum of w_i * f(x_i) over nodes,   w_i = sum of l_i(z) over tokens

l_i is the Lagrange polynomial of node i. Segments end before tokens that can win and at the values
of top_k that the report offers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.polynomial.chebyshev import chebvander

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MAX_LEVEL_TOKENS = 512
LIKELY_TOKENS = 20
# Values of top_k that the report offers beyond the levels.
LARGE_TOP_KS = (
    *(700, 1000, 1500, 2000, 3000, 5000, 7000, 10_000, 15_000, 20_000, 30_000, 50_000),
    *(70_000, 100_000, 150_000, 200_000),
)
# Nodes of a segment: the first number whose error is small enough at these temperatures. The error
# is relative to the sum over all tokens.
NODE_COUNTS = (6, 8, 12, 16, 24, 32, 48, 64, 96)
MAX_ERROR = 1e-13
CHECKED_TEMPERATURES = np.array([0.05, 0.15, 0.35, 0.6, 1.0, 2.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive tokens in the order of logits, below the levels.

    Attributes:
        end: Number of tokens up to its end.
        low: Its smallest logit.
        high: Its largest logit.
        weights: Of the nodes (n,): node i is at (low + high) / 2 + (high - low) / 2 *
            cos(pi * (i + 0.5) / n).
    """

    end: int
    low: float
    high: float
    weights: Floats

    @property
    def nodes(self) -> Floats:
        """The nodes (n,)."""
        return (self.low + self.high) / 2 + (self.high - self.low) / 2 * _nodes(len(self.weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """The logits of one step.

    Attributes:
        levels: The largest logits, distinct and descending, (L,) float32.
        counts: Number of tokens with each of them, (L,).
        segments: The other tokens, in order.
        token_ids: The likely tokens and those that can win, by descending logit, (K,).
        places: Number of tokens with larger logits than each of them, (K,).
        logits: Their logits, (K,) float32.
    """

    levels: npt.NDArray[np.float32]
    counts: Integers
    segments: list[Segment]
    token_ids: Integers
    places: Integers
    logits: npt.NDArray[np.float32]


def step_table(
    logits: npt.NDArray[np.float32],
    noise: Floats,
    *,
    max_temperature: float,
    token: int,
    top_k: int,
) -> StepTable:
    """Return the table of a step.

    Args:
        logits: (V,), the largest of them finite. Tokens with -inf can never be sampled.
        noise: (V,).
        max_temperature: The highest temperature at which the tokens that win are known.
        token: A token to list in any case; its logit is finite.
        top_k: A value of top_k to offer.
    """
    order = np.argsort(-logits, kind="stable")
    order = order[: np.count_nonzero(logits > -np.inf)]
    ordered = logits[order]
    descending = -ordered
    scores = ordered.astype(np.float64) + max_temperature * noise[order]
    is_listed = _beaten_by_one_at_most(scores)
    is_listed[:LIKELY_TOKENS] = True
    is_listed |= order == token
    listed = np.flatnonzero(is_listed)
    places = np.searchsorted(descending, descending[listed], side="left")

    def kept_by(top_ks: npt.ArrayLike) -> Integers:
        """Return how many tokens top_k keeps, ties included."""
        kth = np.minimum(top_ks, len(order)) - 1
        ends: Integers = np.searchsorted(descending, descending[kth], side="right")
        return ends

    n_levels = int(kept_by(MAX_LEVEL_TOKENS))
    levels, counts = np.unique(descending[:n_levels], return_counts=True)
    ends = np.concatenate([places, kept_by([*LARGE_TOP_KS, max(top_k, 1)]), [len(order)]])
    ends = np.unique(ends[ends > n_levels])
    return StepTable(
        levels=-levels,
        counts=counts,
        segments=_segments(ordered.astype(np.float64), n_levels, ends),
        token_ids=order[listed],
        places=places,
        logits=ordered[listed],
    )


def _beaten_by_one_at_most(scores: Floats) -> npt.NDArray[np.bool_]:
    """Return which scores at most one score before them exceeds, (N,)."""
    best = np.maximum.accumulate(scores)
    before = np.concatenate([[-np.inf], best[:-1]])
    second = np.maximum.accumulate(np.minimum(scores, before))
    return scores > np.concatenate([[-np.inf], second[:-1]])


def _segments(logits: Floats, first: int, ends: Integers) -> list[Segment]:
    """Return the segments of tokens from `first`, with these ends."""
    if first == len(logits):
        return []
    terms = np.exp((logits - logits[0])[:, None] / CHECKED_TEMPERATURES)
    bounds = MAX_ERROR * terms.sum(axis=0)
    segments = []
    for end in ends.tolist():
        segments.append(
            _segment(logits[first:end], end, terms[first:end].sum(axis=0), bounds, logits[0])
        )
        first = end
    return segments


def _segment(logits: Floats, end: int, sums: Floats, bounds: Floats, largest: float) -> Segment:
    """Return a segment with enough nodes.

    Args:
        logits: Of its tokens, descending.
        end: Number of tokens up to its end.
        sums: Of the masses of its tokens at the checked temperatures.
        bounds: Errors that are small enough.
        largest: The largest logit of the step.
    """
    low, high = float(logits[-1]), float(logits[0])
    if low == high:
        return Segment(end=end, low=low, high=high, weights=np.array([float(len(logits))]))
    scaled = (2 * logits - (low + high)) / (high - low)
    for count in NODE_COUNTS:
        sums_of_polynomials = chebvander(scaled, count - 1).sum(axis=0)
        sums_of_polynomials[1:] *= 2
        weights = chebvander(_nodes(count), count - 1) @ sums_of_polynomials / count
        segment = Segment(end=end, low=low, high=high, weights=weights)
        terms = np.exp((segment.nodes - largest)[:, None] / CHECKED_TEMPERATURES)
        if (abs(weights @ terms - sums) <= bounds).all():
            break
    return segment


def _nodes(count: int) -> Floats:
    """Return the Chebyshev nodes of the first kind on [-1, 1]."""
    return np.cos(np.pi * (np.arange(count) + 0.5) / count)
