"""Computes what the charts show: a time axis without gaps, rates over time, quantiles, histograms.

All functions take whole columns, and work in blocks of rows, so that temporary arrays stay small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptbatch.pipeline.report.run_columns import Floats, RunColumns

BINS = 180
QUANTILES = (0.5, 0.9, 0.99)
# A gap without running rows is cut out of the time axis if it is as long as both.
MIN_GAP_S = 5.0
MIN_GAP_SHARE = 0.02
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A time without running rows: the run was stopped, or loaded its model.

    Attributes:
        at_s: Its place on the time axis, in seconds.
        began_s: When it began, in seconds since 1970.
        seconds: Its length.
    """

    at_s: float
    began_s: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeAxis:
    """Seconds of work since the first step of the run, without gaps.

    Attributes:
        began_s: The first step, in seconds since 1970.
        ended_s: The last new token, in seconds since 1970.
        gaps: The gaps, in order.
        edges: The BINS + 1 edges of equal bins.
    """

    began_s: float
    ended_s: float
    gaps: list[Gap]
    edges: Floats

    @property
    def active_s(self) -> float:
        """The length of the axis."""
        return float(self.edges[-1])

    @property
    def bin_s(self) -> float:
        """The width of a bin."""
        return float(self.edges[1] - self.edges[0])

    def place(self, times_s: Floats) -> Floats:
        """Return the places of times, in seconds since 1970, on the axis."""
        places: Floats = times_s - self.began_s
        for gap in reversed(self.gaps):
            after = times_s - gap.began_s
            places = places - np.clip(after, 0, gap.seconds)
        return places


def time_axis(columns: RunColumns) -> TimeAxis | None:
    """Return the time axis of a run; None if no row ever ran."""
    ran = np.isfinite(columns.started_s)
    starts, ends = columns.started_s[ran], columns.ended_s[ran]
    if not len(starts):
        return None
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    pauses = starts[1:] - ends[:-1]
    began_s, ended_s = float(starts[0]), float(ends[-1])
    active_s = ended_s - began_s - float(pauses[pauses > 0].sum())
    gaps: list[Gap] = []
    cut_s = 0.0
    for index in np.flatnonzero(pauses >= max(MIN_GAP_S, MIN_GAP_SHARE * active_s)):
        gap_began_s, seconds = float(ends[index]), float(pauses[index])
        gaps.append(Gap(at_s=gap_began_s - began_s - cut_s, began_s=gap_began_s, seconds=seconds))
        cut_s += seconds
    length_s = max(ended_s - began_s - cut_s, 1e-6)
    return TimeAxis(
        began_s=began_s, ended_s=ended_s, gaps=gaps, edges=np.linspace(0.0, length_s, BINS + 1)
    )


def rates(starts: Floats, ends: Floats, amounts: Floats, edges: Floats) -> Floats:
    """Spread amounts evenly over intervals of time, and return their sum per second in each bin.

    An interval without a length counts in its bin. Intervals that hold NaN do not count. The sum
    over all bins, times their width, is that of the amounts within the edges.
    """
    n = len(edges) - 1
    width = (edges[-1] - edges[0]) / n
    # Over an interval, the cumulative amount is slope * (t - start). Sums of slopes, and of slope *
    # start, of the intervals that have begun (minus those that have ended) give it at each edge.
    slopes, offsets, instant = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    for rows in _blocks(len(starts)):
        begin, end, amount = starts[rows], ends[rows], amounts[rows]
        valid = np.isfinite(begin) & np.isfinite(end) & np.isfinite(amount)
        begin, end, amount = begin[valid], end[valid], amount[valid]
        lasts = end > begin
        slope = amount[lasts] / (end[lasts] - begin[lasts])
        for times, sign in ((begin[lasts], 1.0), (end[lasts], -1.0)):
            index = np.clip(np.searchsorted(edges, times, side="left"), 0, n)
            slopes += np.bincount(index, sign * slope, n + 1)
            offsets += np.bincount(index, sign * slope * times, n + 1)
        index = np.clip(np.searchsorted(edges, begin[~lasts], side="left"), 1, n)
        instant += np.bincount(index, amount[~lasts], n + 1)
    cumulative = edges * np.cumsum(slopes) - np.cumsum(offsets) + np.cumsum(instant)
    # Rounding leaves tiny values where nothing ran.
    means: Floats = np.maximum(np.diff(cumulative), 0.0) / width
    return means


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Rates over time, a value per bin of the axis.

    Attributes:
        new_tokens: New tokens per second.
        running: Mean number of running rows.
        computed: Prompt tokens computed per second.
        cached: Prompt tokens found in the prefix cache per second.
    """

    new_tokens: Floats
    running: Floats
    computed: Floats
    cached: Floats


def timeline(columns: RunColumns, axis: TimeAxis) -> Timeline:
    """Compute the rates over time of all rows that ran.

    The first new token counts at the end of the prefill. The others are spread evenly over the
    decode, and the tokens of the prompt over the prefill.
    """
    start = axis.place(columns.started_s)
    first_token = axis.place(columns.started_s + columns.prefill_s)
    end = axis.place(columns.ended_s)
    edges = axis.edges
    new = columns.completion_tokens
    firsts = np.minimum(new, 1).astype(np.float64)
    computed = np.maximum(columns.prompt_tokens - columns.cached_tokens, 0).astype(np.float64)
    return Timeline(
        new_tokens=rates(first_token, first_token, firsts, edges)
        + rates(first_token, end, new - firsts, edges),
        running=rates(start, end, end - start, edges),
        computed=rates(start, first_token, computed, edges),
        cached=rates(start, first_token, columns.cached_tokens.astype(np.float64), edges),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """The distribution of the finite values of a column.

    Attributes:
        count: Number of values.
        mean: Their mean; NaN without values, as all that follow.
        low: The smallest value.
        quantiles: By QUANTILES, with linear interpolation.
        high: The largest value.
    """

    count: int
    mean: float
    low: float
    quantiles: tuple[float, ...]
    high: float


def distribution(values: Floats | Sequence[float]) -> Distribution:
    """Return the distribution of values."""
    finite = _finite(np.asarray(values, np.float64))
    if not len(finite):
        nan = float("nan")
        return Distribution(count=0, mean=nan, low=nan, quantiles=(nan,) * 3, high=nan)
    return Distribution(
        count=len(finite),
        mean=float(finite.mean()),
        low=float(finite.min()),
        quantiles=tuple(float(value) for value in np.quantile(finite, QUANTILES)),
        high=float(finite.max()),
    )


def linear_histogram(values: Floats, bins: int = 40) -> tuple[Floats, Floats]:
    """Return the edges and counts of bins of equal width, in whole numbers, over whole numbers."""
    finite = _finite(np.asarray(values, np.float64))
    if not len(finite):
        return np.array([0.0, 1.0]), np.zeros(1)
    low, high = np.floor(finite.min()), np.floor(finite.max())
    width = max(1.0, np.ceil((high - low + 1) / bins))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(finite, edges)
    return edges, counts.astype(np.float64)


def bin_labels(edges: Floats, counts: Floats, unit: str, *, whole: bool = True) -> list[str]:
    """Return a text for each bin of a histogram: `10 to 19 tokens: 5 rows`.

    Args:
        edges: The edges of the bins.
        counts: Their counts.
        unit: The unit of the values; "" for none.
        whole: Whether the values are whole numbers.
    """
    labels = []
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if not whole:
            values = f"{left:.3g} to {right:.3g}"
        else:
            values = f"{left:,.0f}" + (f" to {right - 1:,.0f}" if right - left > 1 else "")
        labels.append(f"{values} {unit}: {count:,.0f} rows".replace(" :", ":"))
    return labels


def log_histogram(values: Floats, per_decade: int = 6) -> tuple[Floats, Floats]:
    """Return the edges and counts of bins of equal width on a logarithmic scale.

    Zeros and negative values are not counted.
    """
    positive = _finite(values)
    positive = positive[positive > 0]
    if not len(positive):
        return np.array([1.0, 10.0]), np.zeros(1)
    low = np.floor(np.log10(positive.min()) * per_decade)
    high = np.floor(np.log10(positive.max()) * per_decade) + 1
    edges = 10.0 ** (np.arange(low, high + 1) / per_decade)
    counts, _ = np.histogram(positive, edges)
    return edges, counts.astype(np.float64)


def cumulative(values: Floats, points: int = 120) -> tuple[Floats, Floats]:
    """Return values and the share of rows at or below each of them, at evenly spaced shares."""
    finite = _finite(values)
    if not len(finite):
        return np.zeros(0), np.zeros(0)
    shares = np.linspace(0.0, 1.0, points)
    return np.quantile(finite, shares), shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Quantiles of a value over bins of another.

    Attributes:
        centres: The middle of each bin that has enough rows.
        low: The first decile there.
        middle: The median.
        high: The ninth decile.
        counts: Number of rows.
    """

    centres: Floats
    low: Floats
    middle: Floats
    high: Floats
    counts: Floats


def band(x: Floats, y: Floats, bins: int = 16, min_rows: int = 5) -> Band:
    """Return the deciles 1, 5 and 9 of y, in bins of equal width of x."""
    valid = np.isfinite(x) & np.isfinite(y)
    x, y = x[valid], y[valid]
    rows: list[tuple[float, ...]] = []
    if len(x):
        edges = np.linspace(x.min(), max(x.max(), x.min() + 1), bins + 1)
        index = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, bins - 1)
        for number in range(bins):
            inside = y[index == number]
            if len(inside) >= min_rows:
                centre = (edges[number] + edges[number + 1]) / 2
                rows.append((centre, *np.quantile(inside, (0.1, 0.5, 0.9)), len(inside)))
    table = np.array(rows, np.float64).reshape(-1, 5).T
    return Band(centres=table[0], low=table[1], middle=table[2], high=table[3], counts=table[4])


def _finite(values: Floats) -> Floats:
    finite: Floats = values[np.isfinite(values)]
    return finite


def _blocks(n: int) -> Iterator[slice]:
    return (slice(first, first + _BLOCK) for first in range(0, n, _BLOCK))
