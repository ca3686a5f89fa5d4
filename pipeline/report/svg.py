"""Draws charts as SVG: lines, areas, bands, bars and histograms.

Colours, fonts and line widths come from report.css, by class: `c1` to `c6` are the series. A chart
has an accessible title and description; the sections put a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from gptbatch.pipeline.report.run_columns import Floats

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 24
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
# Seconds between two ticks of a time axis.
_TIME_STEPS: tuple[float, ...] = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1, 2, 5, 10, 15, 30),
    *(_MINUTE * count for count in (1, 2, 5, 10, 15, 30)),
    *(_HOUR * count for count in (1, 2, 3, 6, 12)),
    *(_DAY * count for count in (1, 2, 7)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A scale of one direction.

    Attributes:
        low: The value at its start.
        high: The value at its end.
        ticks: Values with their labels.
        is_log: Whether it is logarithmic.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False

    def share(self, values: Floats | float) -> Floats:
        """Return the places of values on the axis, 0 to 1."""
        values = np.asarray(values, np.float64)
        if self.is_log:
            low, high = math.log10(self.low), math.log10(self.high)
            values = np.log10(np.maximum(values, 1e-300))
        else:
            low, high = self.low, self.high
        shares: Floats = np.clip((values - low) / (high - low), 0.0, 1.0)
        return shares


def number_axis(high: float, low: float = 0.0, count: int = 4) -> Axis:
    """Return a linear axis to at least `high`, which ends at a tick."""
    span = high - low if high > low else 1.0
    step = 10 ** (math.log10(span / count) // 1)
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step * count >= span * 0.999)
    first = int(low // step)
    last = max(first + 1, math.ceil((low + span) / step - 1e-9))
    ticks = [(index * step, short(index * step)) for index in range(first, last + 1)]
    return Axis(low=first * step, high=last * step, ticks=ticks)


def log_axis(low: float, high: float, label: Callable[[float], str] | None = None) -> Axis:
    """Return a logarithmic axis; ticks stand at powers of ten."""
    label = label or short
    high = max(high, low * 1.001)
    first, last = math.ceil(math.log10(low) - 1e-9), int((math.log10(high) + 1e-9) // 1)
    step = max(1, math.ceil((last - first + 1) / 7))
    ticks = [(10.0**power, label(10.0**power)) for power in range(first, last + 1, step)]
    return Axis(low=low, high=high, ticks=ticks, is_log=True)


def seconds_axis(length_s: float, count: int = 8) -> Axis:
    """Return an axis from 0 to a length of time, with ticks at round times."""
    step = next((step for step in _TIME_STEPS if length_s / step <= count), _TIME_STEPS[-1])
    step *= max(1, math.ceil(length_s / step / count))
    label = duration if step >= 1 else lambda seconds: f"{seconds:.4g} s" if seconds else "0"
    ticks = [(index * step, label(index * step)) for index in range(int(length_s / step) + 1)]
    return Axis(low=0.0, high=max(length_s, 1e-9), ticks=ticks)


class Plot:
    """A chart under construction.

    Args:
        x: The horizontal axis.
        y: The vertical axis.
        size: Width and height in units of the text, of 12 to 13 per line.
        title: The accessible title.
        description: The main finding, as its accessible description.
        name: The name of its series in the data of the section, for scripts; "" for none.
    """

    def __init__(
        self,
        x: Axis,
        y: Axis,
        *,
        size: tuple[int, int],
        title: str,
        description: str,
        name: str = "",
    ) -> None:
        self._x, self._y, self._size = x, y, size
        self._title, self._description, self._name = title, description, name
        self._marks: list[Markup] = []

    def area(self, xs: Floats, ys: Floats, style: str, base: Floats | None = None) -> None:
        """Fill the area below a line, down to `base` or 0."""
        base = np.full(len(xs), self._y.low) if base is None else base
        points = [*self._points(xs, ys), *reversed(self._points(xs, base))]
        self._mark('<path class="area {}" d="M{}Z"/>', style, "L".join(points))

    def line(self, xs: Floats, ys: Floats, style: str) -> None:
        """Draw a line."""
        self._mark('<path class="line {}" d="M{}"/>', style, "L".join(self._points(xs, ys)))

    def steps(self, edges: Floats, ys: Floats, style: str, base: Floats | None = None) -> None:
        """Fill the area below a value per bin."""
        self.area(
            np.repeat(edges, 2)[1:-1],
            np.repeat(ys, 2),
            style,
            base if base is None else np.repeat(base, 2),
        )

    def bars(self, edges: Floats, counts: Floats, style: str, labels: Sequence[str]) -> None:
        """Draw a bar per bin, each with a label that shows on hovering."""
        lefts, rights = self._across(edges[:-1]), self._across(edges[1:])
        tops = self._down(counts)
        bottom = self._down(np.array([self._y.low]))[0]
        for left, right, top, count, label in zip(lefts, rights, tops, counts, labels, strict=True):
            if count > 0:
                top = min(top, bottom - 1)
                self._mark(
                    '<rect class="bar {}" x="{}" y="{}" width="{}" height="{}">'
                    "<title>{}</title></rect>",
                    style,
                    _unit(left),
                    _unit(top),
                    _unit(max(right - left - 0.8, 0.6)),
                    _unit(bottom - top),
                    label,
                )

    def level(self, y: float, label: str) -> None:
        """Draw a dashed horizontal line with a label."""
        at = _unit(self._down(np.array([y]))[0])
        left, right = LEFT, self._size[0] - RIGHT
        self._mark('<path class="level" d="M{} {}H{}"/>', left, at, right)
        self._mark(
            '<text class="label" x="{}" y="{}" text-anchor="end">{}</text>',
            right - 2,
            _unit(float(at) - 4),
            label,
        )

    def mark(self, x: float, label: str, row: int = 0) -> None:
        """Draw a dashed vertical line with a label at its top."""
        at = self._across(np.array([x]))[0]
        bottom = self._size[1] - BOTTOM
        self._mark('<path class="level" d="M{} {}V{}"/>', _unit(at), TOP, bottom)
        is_late = at > self._size[0] * 0.7
        self._mark(
            '<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>',
            _unit(at - 4 if is_late else at + 4),
            TOP + 10 + 13 * row,
            "end" if is_late else "start",
            label,
        )

    def text(self, x: float, y: float, label: str, style: str) -> None:
        """Write a label in the colour of a series."""
        across, down = self._across(np.array([x]))[0], self._down(np.array([y]))[0]
        self._mark(
            '<text class="series-label {}" x="{}" y="{}">{}</text>',
            style,
            _unit(across),
            _unit(down),
            label,
        )

    def markup(self) -> Markup:
        """Return the SVG element."""
        width, height = self._size
        return Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"{}>'
            "<title>{}</title><desc>{}</desc>{}{}</svg>"
        ).format(
            width,
            height,
            f"{self._title}. {self._description}",
            self._for_scripts(),
            self._title,
            self._description,
            self._frame(),
            Markup("").join(self._marks),
        )

    def _for_scripts(self) -> Markup:
        if not self._name:
            return Markup("")
        return Markup(' data-series="{}" data-left="{}" data-right="{}" data-bottom="{}"').format(
            self._name, LEFT, self._size[0] - RIGHT, self._size[1] - BOTTOM
        )

    def _frame(self) -> Markup:
        width, height = self._size
        right, bottom = width - RIGHT, height - BOTTOM
        parts = []
        for value, label in self._y.ticks:
            at = _unit(self._down(np.array([value]))[0])
            parts.append(
                Markup(
                    '<path class="grid" d="M{} {}H{}"/>'
                    '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
                ).format(LEFT, at, right, LEFT - 6, _unit(float(at) + 4), label)
            )
        for value, label in self._x.ticks:
            across = self._across(np.array([value]))[0]
            anchor = "end" if across > right - 14 else "middle"
            parts.append(
                Markup(
                    '<path class="tick-mark" d="M{} {}v4"/>'
                    '<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>'
                ).format(
                    _unit(across),
                    bottom,
                    _unit(min(across, right)),
                    bottom + 17,
                    anchor,
                    label,
                )
            )
        parts.append(Markup('<path class="base" d="M{} {}H{}"/>').format(LEFT, bottom, right))
        return Markup("").join(parts)

    def _across(self, values: Floats) -> Floats:
        return LEFT + self._x.share(values) * (self._size[0] - LEFT - RIGHT)

    def _down(self, values: Floats) -> Floats:
        bottom = self._size[1] - BOTTOM
        return bottom - self._y.share(values) * (bottom - TOP)

    def _points(self, xs: Floats, ys: Floats) -> list[str]:
        return [
            f"{_unit(x)} {_unit(y)}" for x, y in zip(self._across(xs), self._down(ys), strict=True)
        ]

    def _mark(self, template: str, *values: object) -> None:
        self._marks.append(Markup(template).format(*values))


def both_widths(
    draw: Callable[[tuple[int, int]], Markup], wide: tuple[int, int], narrow: tuple[int, int]
) -> Markup:
    """Return a chart in two sizes, of which the style sheet shows one: texts keep their size.

    Args:
        draw: Draws the chart in a size.
        wide: The size for wide windows.
        narrow: The size for narrow ones.
    """
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        draw(wide), draw(narrow)
    )


def share_bar(shares: Sequence[tuple[str, float, str]], title: str) -> Markup:
    """Return one bar that is divided among (label, share, style)."""
    parts, at = [], 0.0
    for label, share, style in shares:
        parts.append(
            Markup(
                '<rect class="bar {}" x="{}" y="0" width="{}" height="14"><title>{}</title></rect>'
            ).format(style, _unit(at * 400), _unit(max(share * 400 - 1, 0.8)), label)
        )
        at += share
    described = ", ".join(label for label, _, _ in shares)
    return Markup(
        '<svg class="share" viewBox="0 0 400 14" preserveAspectRatio="none" role="img"'
        ' aria-label="{}">{}</svg>'
    ).format(f"{title}: {described}", Markup("").join(parts))


def short(value: float) -> str:
    """Return a number for a tick: 1.5k, 20M, 0.001, 1e-6."""
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a length of time in at most two units: 340 ms, 12.5 s, 4 min 10 s, 2 h 5 min."""
    if seconds != seconds:
        return ""
    if seconds == 0:
        return "0"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for unit, name, smaller, smaller_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s"


def _unit(value: float) -> str:
    """Return a coordinate with one decimal."""
    return f"{value:.1f}".removesuffix(".0")
