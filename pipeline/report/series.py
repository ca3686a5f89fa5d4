"""Computes what the charts show: a time axis without gaps, rates over time, quantiles, histograms.

All functions take whole columns, and work in blocks of rows, so that temporary arrays stay small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gptbatch.pipeline.report.run_columns import Floats, Integers, RunColumns

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
    order = np.argsort(columns.started_s, kind="stable")
    # NaN comes last.
    order = order[: int(np.isfinite(columns.started_s).sum())]
    if not len(order):
        return None
    began_s = ended_s = float(columns.started_s[order[0]])
    pauses: list[tuple[float, float]] = []
    for block in blocks(len(order)):
        rows = order[block]
        starts = columns.started_s[rows]
        ends = starts + columns.prefill_s[rows] + columns.decode_s[rows]
        # When the rows before each of these have all ended.
        before = np.maximum.accumulate(np.concatenate([[ended_s], ends]))
        ended_s = float(before[-1])
        for index in np.flatnonzero(starts - before[:-1] >= MIN_GAP_S):
            pauses.append((float(before[index]), float(starts[index] - before[index])))
    active_s = ended_s - began_s - sum(seconds for _, seconds in pauses)
    gaps: list[Gap] = []
    cut_s = 0.0
    for gap_began_s, seconds in pauses:
        if seconds >= MIN_GAP_SHARE * active_s:
            at_s = gap_began_s - began_s - cut_s
            gaps.append(Gap(at_s=at_s, began_s=gap_began_s, seconds=seconds))
            cut_s += seconds
    length_s = max(ended_s - began_s - cut_s, 1e-6)
    return TimeAxis(
        began_s=began_s, ended_s=ended_s, gaps=gaps, edges=np.linspace(0.0, length_s, BINS + 1)
    )


class Rates:
    """Spreads amounts evenly over intervals of time, and sums them per bin.

    An interval without a length counts in its bin. Intervals that hold NaN do not count.

    Args:
        edges: The edges of equal bins.
    """

    def __init__(self, edges: Floats) -> None:
        self._edges, self._n = edges, len(edges) - 1
        # Over an interval, the cumulative amount is slope * (t - start). Sums of slopes, and of
        # slope * start, of the intervals that have begun (minus those that have ended) give it at
        # each edge.
        self._slopes, self._offsets, self._instant = (np.zeros(self._n + 1) for _ in range(3))

    def add(self, starts: Floats, ends: Floats, amounts: Floats) -> None:
        """Add intervals."""
        n = self._n
        valid = np.isfinite(starts) & np.isfinite(ends) & np.isfinite(amounts)
        begin, end, amount = starts[valid], ends[valid], amounts[valid]
        lasts = end > begin
        slope = amount[lasts] / (end[lasts] - begin[lasts])
        for times, sign in ((begin[lasts], 1.0), (end[lasts], -1.0)):
            index = np.clip(np.searchsorted(self._edges, times, side="left"), 0, n)
            self._slopes += np.bincount(index, sign * slope, n + 1)
            self._offsets += np.bincount(index, sign * slope * times, n + 1)
        index = np.clip(np.searchsorted(self._edges, begin[~lasts], side="left"), 1, n)
        self._instant += np.bincount(index, amount[~lasts], n + 1)

    def per_second(self) -> Floats:
        """Return the sum per second in each bin. Over all bins it keeps the sum of the amounts."""
        edges = self._edges
        cumulative = edges * np.cumsum(self._slopes) - np.cumsum(self._offsets)
        cumulative += np.cumsum(self._instant)
        # Rounding leaves tiny values where nothing ran.
        means: Floats = np.maximum(np.diff(cumulative), 0.0) * self._n / (edges[-1] - edges[0])
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
    new_tokens, running, computed, cached = (Rates(axis.edges) for _ in range(4))
    for rows in blocks(len(columns)):
        started_s = columns.started_s[rows]
        first_token_s = started_s + columns.prefill_s[rows]
        start, first_token = axis.place(started_s), axis.place(first_token_s)
        end = axis.place(first_token_s + columns.decode_s[rows])
        new, found = columns.completion_tokens[rows], columns.cached_tokens[rows]
        firsts = np.minimum(new, 1).astype(np.float64)
        new_tokens.add(first_token, first_token, firsts)
        new_tokens.add(first_token, end, new - firsts)
        running.add(start, end, end - start)
        prompt = columns.prompt_tokens[rows].astype(np.float64)
        computed.add(start, first_token, np.maximum(prompt - found, 0.0))
        cached.add(start, first_token, found.astype(np.float64))
    return Timeline(
        new_tokens=new_tokens.per_second(),
        running=running.per_second(),
        computed=computed.per_second(),
        cached=cached.per_second(),
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


def distribution(values: Floats | Integers) -> Distribution:
    """Return the distribution of values."""
    finite = _finite(values)
    if not len(finite):
        nan = float("nan")
        return Distribution(count=0, mean=nan, low=nan, quantiles=(nan,) * 3, high=nan)
    return Distribution(
        count=len(finite),
        mean=float(finite.mean(dtype=np.float64)),
        low=float(finite.min()),
        high=float(finite.max()),
        quantiles=tuple(map(float, np.quantile(finite, QUANTILES, overwrite_input=True))),
    )


def linear_histogram(values: Integers, bins: int = 40) -> tuple[Floats, Floats]:
    """Return the edges and counts of bins of equal width, in whole numbers, over whole numbers."""
    if not len(values):
        return np.array([0.0, 1.0]), np.zeros(1)
    low, high = float(values.min()), float(values.max())
    width = max(1.0, np.ceil((high - low + 1) / bins))
    edges = np.arange(low, high + width + 1, width)
    counts, _ = np.histogram(values, edges)
    return edges, counts.astype(np.float64)


def bin_labels(edges: Floats, counts: Floats, unit: str, *, whole: bool = True) -> list[str]:
    """Return a text for each bin of a histogram: `10 to 19 tokens: 5`.

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
        labels.append(f"{values} {unit}: {count:,.0f}".replace(" :", ":"))
    return labels


def log_histogram(values: Floats, per_decade: int = 6) -> tuple[Floats, Floats]:
    """Return the edges and counts of bins of equal width on a logarithmic scale.

    Zeros and negative values are not counted.
    """
    positive = values[(values > 0) & np.isfinite(values)]
    if not len(positive):
        return np.array([1.0, 10.0]), np.zeros(1)
    low = np.log10(positive.min()) * per_decade // 1
    high = np.log10(positive.max()) * per_decade // 1 + 1
    edges = 10.0 ** (np.arange(low, high + 1) / per_decade)
    counts, _ = np.histogram(positive, edges)
    return edges, counts.astype(np.float64)


def cumulative(values: Floats, points: int = 120) -> tuple[Floats, Floats]:
    """Return values and the share of rows at or below each of them, at evenly spaced shares."""
    finite = _finite(values)
    if not len(finite):
        return np.zeros(0), np.zeros(0)
    shares = np.linspace(0.0, 1.0, points)
    return np.quantile(finite, shares, overwrite_input=True), shares


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


def band(x: Integers, y: Floats, bins: int = 16, min_rows: int = 5) -> Band:
    """Return the deciles 1, 5 and 9 of y, in bins of equal width of x."""
    valid = np.isfinite(y)
    rows: list[tuple[float, ...]] = []
    if valid.any():
        low, high = float(x[valid].min()), float(x[valid].max())
        edges = np.linspace(low, max(high, low + 1), bins + 1)
        for number, (left, right) in enumerate(itertools.pairwise(edges)):
            is_last = number == bins - 1
            inside = y[valid & (x >= left) & ((x < right) | (is_last & (x <= right)))]
            if len(inside) >= min_rows:
                deciles = np.quantile(inside, (0.1, 0.5, 0.9))
                rows.append(((left + right) / 2, *map(float, deciles), len(inside)))
    table = np.array(rows, np.float64).reshape(-1, 5).T
    return Band(centres=table[0], low=table[1], middle=table[2], high=table[3], counts=table[4])


def blocks(n: int) -> Iterator[slice]:
    """Yield blocks of the rows 0 to n - 1."""
    return (slice(first, first + _BLOCK) for first in range(0, n, _BLOCK))


def _finite(values: Floats | Integers) -> Floats:
    """Return a copy of the finite values."""
    finite: Floats = values[np.isfinite(values)].astype(np.float32, copy=False)
    return finite
