"""The sections of distributions over rows: times and lengths, and decision margins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from markupsafe import Markup

from gptbatch.pipeline.report import series, svg
from gptbatch.pipeline.report.document import Section, note, render
from gptbatch.pipeline.report.run_columns import Floats, Integers, RunColumns
from gptbatch.pipeline.report.run_view import RunView

WIDE, NARROW = (540, 230), (340, 210)
QUANTILE_HEADER = ("mean", "smallest", "p50", "p90", "p99", "largest")
MARGIN_LIMITS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_SHARES = (0, 0.25, 0.5, 0.75, 1)
_Size = tuple[int, int]
_Draw = Callable[[_Size], Markup]


def distribution_section(view: RunView) -> Section:
    """Return the section of times, and of lengths of prompts and completions."""
    columns = view.columns
    times = {"queue": columns.queue_s, "prefill": columns.prefill_s, "decode": columns.decode_s}
    rows = [_quantile_row(name, values, svg.duration) for name, values in times.items()]
    first_token_s = columns.queue_s + columns.prefill_s
    rows.append(_quantile_row("first token", first_token_s, svg.duration))
    del first_token_s
    figures = [
        _figure(f"Times: share of {view.unit} at or below", partial(_draw_times, times)),
        _figure(
            "Milliseconds per new token, by tokens of prompt and completion", _speed_chart(view)
        ),
    ]
    ran = np.isfinite(columns.started_s)
    lengths = []
    for name, style in (("prompt", "c5"), ("completion", "c1")):
        values = getattr(columns, f"{name}_tokens")[ran]
        draw = partial(_draw_lengths, values, style)
        figures.append(_figure(f"Tokens of {name}s: {view.unit}", draw))
        lengths.append(_quantile_row(f"{name} tokens", values, _count))
    html = render(
        "distributions.html",
        figures=figures if ran.any() else [],
        unit=view.unit,
        header=("", view.unit, *QUANTILE_HEADER),
        rows=rows,
        lengths=lengths,
    )
    return Section(id="distributions", title="Times and lengths", html=html)


def margin_section(view: RunView) -> Section:
    """Return the section of decision margins, and of perplexities where they were recorded."""
    columns = view.columns
    margins = columns.margins
    n_margins = int(np.isfinite(margins).sum())
    perplexities = _perplexities(columns)
    figures, rows = [], []
    if n_margins:
        draw = partial(_draw_log, margins, "c6", "logits")
        one = view.unit.removesuffix("s")
        title = f"Smallest decision margin of each {one}, in logits: {view.unit}"
        figures.append(_figure(title, draw))
        rows.append(_quantile_row("margin", margins, _number))
    if len(perplexities):
        draw = partial(_draw_log, perplexities, "c3", "")
        figures.append(_figure(f"Perplexity of each completion: {view.unit}", draw))
        rows.append(_quantile_row("perplexity", perplexities, _number))
    below = [(limit, int((margins < limit).sum())) for limit in MARGIN_LIMITS]
    html = render(
        "margins.html",
        figures=figures,
        limits=[(f"{limit:g}", f"{count:,}", f"{count / n_margins:.3%}") for limit, count in below]
        if n_margins
        else [],
        has_perplexity=len(perplexities) > 0,
        unit=view.unit,
        header=("", view.unit, *QUANTILE_HEADER),
        rows=rows,
    )
    return Section(id="margins", title="Margins", html=html)


def _perplexities(columns: RunColumns) -> Floats:
    """Return exp of the mean negative log probability of each completion that has one."""
    if columns.logprobs is None:
        return np.zeros(0)
    with np.errstate(over="ignore"):
        values: Floats = np.exp(-columns.logprobs / np.maximum(columns.completion_tokens, 1))
    finite: Floats = values[np.isfinite(values)]
    return finite


def _draw_times(times: dict[str, Floats], size: _Size) -> Markup:
    low = min(float(values.min(initial=np.inf, where=values > 0)) for values in times.values())
    high = max(float(values.max(initial=0.0, where=values > 0)) for values in times.values())
    if high == 0:
        low, high = 1e-3, 1.0
    plot = svg.Plot(
        svg.log_axis(max(low, high / 1e7), high, svg.duration),
        svg.Axis(low=0, high=1, ticks=[(share, f"{share:.0%}") for share in _SHARES]),
        size=size,
        title="Cumulative distribution of queue, prefill and decode times",
        description="The table below has the quantiles.",
    )
    for index, (name, values) in enumerate(times.items()):
        xs, shares = series.cumulative(values)
        style = ("c2", "c3", "c1")[index]
        if len(xs):
            plot.line(xs, shares, f"{style} dash{index}")
            at = (0.3, 0.5, 0.75)[index]
            plot.text(float(np.quantile(xs, at)), at, name, style)
    return plot.markup()


def _draw_lengths(values: Integers, style: str, size: _Size) -> Markup:
    edges, counts = series.linear_histogram(values)
    found = series.distribution(values)
    plot = svg.Plot(
        svg.number_axis(float(edges[-1]), float(edges[0]), 6),
        svg.number_axis(float(counts.max())),
        size=size,
        title="Histogram of lengths in tokens",
        description=f"Median {found.quantiles[0]:,.0f}, largest {found.high:,.0f}.",
    )
    plot.bars(edges, counts, style, series.bin_labels(edges, counts, "tokens"))
    if found.count:
        plot.mark(found.quantiles[0], f"p50 {found.quantiles[0]:,.0f}")
    return plot.markup()


def _speed_chart(view: RunView) -> _Draw:
    """Return the chart of decode times per token."""
    columns = view.columns
    new = columns.completion_tokens
    per_token_ms = 1e3 * columns.decode_s
    per_token_ms /= np.maximum(new - 1, 1)
    per_token_ms[new < 2] = np.nan
    found = series.band(columns.prompt_tokens + new, per_token_ms)
    if not len(found.centres):
        return lambda size: note("Too few rows with two or more new tokens.")

    def draw(size: _Size) -> Markup:
        plot = svg.Plot(
            svg.number_axis(float(found.centres[-1]), float(found.centres[0]), 6),
            svg.number_axis(float(found.high.max())),
            size=size,
            title="Milliseconds per new token, by tokens of prompt and completion",
            description="The median, and the first to the ninth decile as a band.",
        )
        plot.area(found.centres, found.high, "c1 band", found.low)
        plot.line(found.centres, found.middle, "c1")
        at = len(found.centres) // 2
        plot.text(float(found.centres[at]), float(found.low.min()) * 0.85, "median", "c1")
        return plot.markup()

    return draw


def _draw_log(values: Floats, style: str, unit: str, size: _Size) -> Markup:
    edges, counts = series.log_histogram(values)
    plot = svg.Plot(
        svg.log_axis(float(edges[0]), float(edges[-1])),
        svg.number_axis(float(counts.max())),
        size=size,
        title="Histogram on a logarithmic scale",
        description=f"Median {_number(series.distribution(values).quantiles[0])} {unit}.",
    )
    plot.bars(edges, counts, style, series.bin_labels(edges, counts, unit, whole=False))
    return plot.markup()


def _figure(caption: str, draw: _Draw) -> tuple[str, Markup]:
    return caption, svg.both_widths(draw, WIDE, NARROW)


def _quantile_row(name: str, values: Floats | Integers, form: Callable[[float], str]) -> list[str]:
    found = series.distribution(values)
    numbers = (found.mean, found.low, *found.quantiles, found.high)
    return [name, f"{found.count:,}", *(form(number) if found.count else "" for number in numbers)]


def _count(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _number(value: float) -> str:
    return f"{value:.3g}"
