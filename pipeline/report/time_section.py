"""The section of a run over time: new tokens, running rows, and prompt tokens."""

from __future__ import annotations

from functools import partial

from markupsafe import Markup

from gptbatch.pipeline.report import series, svg
from gptbatch.pipeline.report.document import Section, moment, note, render, template_text
from gptbatch.pipeline.report.run_columns import Floats
from gptbatch.pipeline.report.run_view import RunView

WIDE, NARROW = (980, 140), (380, 140)
_TABLE_BINS = 12


def time_section(view: RunView) -> Section:
    """Return the section of new tokens, running rows and prompt tokens over time."""
    axis, rates = view.axis, view.timeline
    if axis is None or rates is None:
        return Section(id="time", title="Over time", html=note("No row has run yet."))
    charts = []
    for name, title, draw in (
        ("new_tokens", "New tokens per second", _draw_new_tokens),
        ("running", "Running rows", _draw_running),
        ("prompt_tokens", "Prompt tokens per second", _draw_prompts),
    ):
        charts.append((name, title, svg.both_widths(partial(draw, view), WIDE, NARROW)))
    lines = {
        "new_tokens": rates.new_tokens,
        "running": rates.running,
        "computed": rates.computed,
        "cached": rates.cached,
    }
    html = render(
        "time.html",
        charts=charts,
        header=("from", "new tokens/s", "running rows", "prompt tokens/s", "found in the cache/s"),
        rows=_time_rows(axis, lines),
        axis=axis,
        moment=moment,
        duration=svg.duration,
    )
    data = {
        "bin_s": axis.bin_s,
        "charts": {
            "new_tokens": [["new tokens/s", _rounded(rates.new_tokens)]],
            "running": [["running rows", _rounded(rates.running)]],
            "prompt_tokens": [
                ["computed/s", _rounded(rates.computed)],
                ["from the cache/s", _rounded(rates.cached)],
            ],
        },
    }
    return Section(
        id="time", title="Over time", html=html, data=data, script=template_text("time.js")
    )


def _time_rows(axis: series.TimeAxis, lines: dict[str, Floats]) -> list[list[str]]:
    """Return means over a few parts of the time axis."""
    step = series.BINS // _TABLE_BINS
    return [
        [svg.duration(float(axis.edges[first])) or "0"]
        + [f"{float(values[first : first + step].mean()):,.1f}" for values in lines.values()]
        for first in range(0, series.BINS, step)
    ]


def _time_plot(
    view: RunView, size: tuple[int, int], high: float, title: str, description: str, name: str
) -> svg.Plot:
    assert view.axis is not None
    x = svg.seconds_axis(view.axis.active_s, 10 if size == WIDE else 4)
    plot = svg.Plot(
        x,
        svg.number_axis(high, count=3),
        size=size,
        title=title,
        description=description,
        name=name,
    )
    for gap in view.axis.gaps[:8]:
        plot.mark(gap.at_s, f"gap of {svg.duration(gap.seconds)}" if size == WIDE else "gap")
    return plot


def _draw_new_tokens(view: RunView, size: tuple[int, int]) -> Markup:
    assert view.axis is not None
    assert view.timeline is not None
    values = view.timeline.new_tokens
    plot = _time_plot(
        view,
        size,
        float(values.max()),
        "New tokens per second over time",
        f"Mean {view.totals.tokens_per_s:,.0f}, largest {values.max():,.0f}.",
        "new_tokens",
    )
    plot.steps(view.axis.edges, values, "c1")
    if view.totals.tokens_per_s is not None:
        plot.level(view.totals.tokens_per_s, f"mean {view.totals.tokens_per_s:,.0f}")
    return plot.markup()


def _draw_running(view: RunView, size: tuple[int, int]) -> Markup:
    assert view.axis is not None
    assert view.timeline is not None
    values = view.timeline.running
    limit = view.batch_size
    high = float(values.max())
    shows_limit = limit is not None and limit <= 4 * high
    plot = _time_plot(
        view,
        size,
        max(high, limit or 0) * 1.05 if shows_limit else high,
        "Running rows over time",
        f"Largest mean of a bin {values.max():,.1f}.",
        "running",
    )
    plot.steps(view.axis.edges, values, "c3")
    if shows_limit and limit is not None:
        plot.level(limit, f"batch_size {limit}")
    return plot.markup()


def _draw_prompts(view: RunView, size: tuple[int, int]) -> Markup:
    assert view.axis is not None
    assert view.timeline is not None
    computed, cached = view.timeline.computed, view.timeline.cached
    plot = _time_plot(
        view,
        size,
        float((computed + cached).max()),
        "Prompt tokens per second over time",
        f"{view.totals.cached_share or 0:.1%} of prompt tokens were found in the prefix cache.",
        "prompt_tokens",
    )
    plot.steps(view.axis.edges, computed + cached, "c2 hatched", computed)
    plot.steps(view.axis.edges, computed, "c5")
    return plot.markup()


def _rounded(values: Floats) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
