"""The sections of distributions over rows: times and lengths, and decision margins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from markupsafe import Markup

from gptbatch.pipeline.report import series, svg
from gptbatch.pipeline.report.document import Section, note, render
from gptbatch.pipeline.report.run_columns import Floats
from gptbatch.pipeline.report.run_view import RunView

SIZE = (420, 220)
QUANTILE_HEADER = ("", "rows", "mean", "smallest", "p50", "p90", "p99", "largest")
MARGIN_LIMITS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def distribution_section(view: RunView) -> Section:
    """Return the section of times, and of lengths of prompts and completions."""
    columns = view.columns
    times = {
        "queue": columns.queue_s,
        "prefill": columns.prefill_s,
        "decode": columns.decode_s,
        "first token": columns.queue_s + columns.prefill_s,
    }
    ran = np.isfinite(columns.started_s)
    prompts = columns.prompt_tokens[ran].astype(np.float64)
    completions = columns.completion_tokens[ran].astype(np.float64)
    figures = [
        ("Share of rows at or below a time", _draw_times(times)),
        _figure(
            "Time per new token in decode, by tokens of prompt and completion",
            _draw_speed(view),
        ),
        ("Tokens of prompts", _draw_lengths(prompts, "c5", "Tokens of prompts")),
        ("Tokens of completions", _draw_lengths(completions, "c1", "Tokens of completions")),
    ]
    rows = [_quantile_row(name, values, svg.duration) for name, values in times.items()]
    lengths = [
        _quantile_row("prompt tokens", prompts, _count),
        _quantile_row("completion tokens", completions, _count),
    ]
    html = render(
        "distributions.html", figures=figures, header=QUANTILE_HEADER, rows=rows, lengths=lengths
    )
    return Section(id="distributions", title="Times and lengths", html=html)


def _draw_times(times: dict[str, Floats]) -> Markup:
    shown = {name: times[name] for name in ("queue", "prefill", "decode")}
    positive = [values[np.isfinite(values) & (values > 0)] for values in shown.values()]
    low = min((float(values.min()) for values in positive if len(values)), default=1e-3)
    high = max((float(values.max()) for values in positive if len(values)), default=1.0)
    plot = svg.Plot(
        svg.log_axis(max(low, high / 1e7), high, svg.duration),
        svg.Axis(
            low=0, high=1, ticks=[(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)]
        ),
        size=SIZE,
        title="Cumulative distribution of times",
        description="The table below has the quantiles.",
    )
    for index, (name, values) in enumerate(shown.items()):
        xs, shares = series.cumulative(values)
        style = ("c2", "c5", "c1")[index]
        if len(xs):
            plot.line(xs, shares, f"{style} dash{index}")
            plot.text(float(np.median(xs)), 0.42 + 0.17 * index, name, style)
    return plot.markup()


def _draw_lengths(values: Floats, style: str, title: str) -> Markup:
    edges, counts = series.linear_histogram(values)
    found = series.distribution(values)
    plot = svg.Plot(
        svg.number_axis(float(edges[-1]), float(edges[0]), 6),
        svg.number_axis(float(counts.max())),
        size=SIZE,
        title=title,
        description=f"Median {found.quantiles[0]:,.0f}, largest {found.high:,.0f}.",
    )
    labels = [
        f"{left:,.0f} to {right - 1:,.0f} tokens: {count:,.0f} rows"
        if right - left > 1
        else f"{left:,.0f} tokens: {count:,.0f} rows"
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    plot.bars(edges, counts, style, labels)
    if found.count:
        plot.mark(found.quantiles[0], f"p50 {found.quantiles[0]:,.0f}")
    return plot.markup()


def _draw_speed(view: RunView) -> Markup:
    columns = view.columns
    new = columns.completion_tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        per_token = np.where(new > 1, columns.decode_s / (new - 1), np.nan)
    found = series.band((columns.prompt_tokens + new).astype(np.float64), per_token)
    if not len(found.centres):
        return note("Too few rows with two or more new tokens.")
    low, high = float(found.centres[0]), float(found.centres[-1])
    plot = svg.Plot(
        svg.number_axis(high, low, 6),
        svg.number_axis(float(found.high.max()) * 1e3),
        size=SIZE,
        title="Milliseconds per new token, by tokens of prompt and completion",
        description="Median, with the first and the ninth decile around it.",
    )
    plot.area(found.centres, found.high * 1e3, "c1 band", found.low * 1e3)
    plot.line(found.centres, found.middle * 1e3, "c1")
    return plot.markup() + Markup(
        '<p class="note">Milliseconds: median, and deciles 1 to 9 as a band.</p>'
    )


def margin_section(view: RunView) -> Section:
    """Return the section of decision margins, and of perplexities where they were recorded."""
    columns = view.columns
    margins = columns.margins[np.isfinite(columns.margins)]
    figures = []
    if len(margins):
        figures.append(
            _figure(
                "Smallest decision margin of each row, in logits",
                _draw_log(margins, "c6", "Smallest decision margins", "logits"),
            )
        )
    new = np.maximum(columns.completion_tokens, 1)
    means = columns.logprobs / new
    has_logprobs = bool(np.isfinite(means).any())
    if has_logprobs:
        figures.append(
            _figure(
                "Perplexity of each completion: exp of its mean negative log probability",
                _draw_log(np.exp(-means), "c3", "Perplexity of completions", ""),
            )
        )
    html = render(
        "margins.html",
        figures=figures,
        limits=[
            (f"{limit:g}", f"{int((margins < limit).sum()):,}", f"{(margins < limit).mean():.3%}")
            for limit in MARGIN_LIMITS
        ]
        if len(margins)
        else [],
        header=QUANTILE_HEADER,
        rows=[_quantile_row("margin", margins, _number)]
        + ([_quantile_row("perplexity", np.exp(-means), _number)] if has_logprobs else []),
    )
    return Section(id="margins", title="Margins", html=html)


def _draw_log(values: Floats, style: str, title: str, unit: str) -> Markup:
    edges, counts = series.log_histogram(values)
    plot = svg.Plot(
        svg.log_axis(float(edges[0]), float(edges[-1])),
        svg.number_axis(float(counts.max())),
        size=SIZE,
        title=title,
        description=f"Median {_number(float(np.median(values[np.isfinite(values)])))} {unit}.",
    )
    labels = [
        f"{left:.3g} to {right:.3g} {unit}: {count:,.0f} rows"
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    plot.bars(edges, counts, style, labels)
    return plot.markup()


def _figure(caption: str, chart: Markup) -> tuple[str, Markup]:
    return caption, chart


def _quantile_row(name: str, values: Floats, form: Callable[[float], str]) -> list[str]:
    found = series.distribution(values)
    numbers = (found.mean, found.low, *found.quantiles, found.high)
    return [name, f"{found.count:,}", *(form(number) if found.count else "" for number in numbers)]


def _count(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _number(value: float) -> str:
    return f"{value:.3g}"
