"""Draw charts of benchmark results with matplotlib, which is imported where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gptbatch.pipeline.bench.scaling import Curve
from gptbatch.pipeline.errors import ConfigError

COLOURS = {"naive": "tab:red", "cached": "tab:blue", "slide": "tab:green"}
DPI = 120


def check_matplotlib() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ConfigError("charts need matplotlib; install gptbatch[bench]") from error


def draw_scaling(curves: Sequence[Curve], path: Path, *, n_positions: int, title: str) -> None:
    """Draw seconds per token over the step, on a logarithmic scale, with the best fits."""
    figure, axes = _figure(8, 5)
    for curve in curves:
        colour = COLOURS[curve.name]
        axes.plot(curve.steps, curve.seconds, ".", markersize=3, color=colour, label=curve.name)
        if curve.name == "slide":
            continue
        x = np.linspace(1, n_positions, 200)
        for fit, style in (("linear", "--"), ("quadratic", "-")):
            axes.plot(
                x,
                np.polyval(getattr(curve, fit), x),
                style,
                linewidth=1,
                color=colour,
                alpha=0.7,
                label=f"{curve.name}, {fit} fit",
            )
    # A linear fit may come down to 0.
    axes.set_ylim(bottom=min(min(curve.seconds) for curve in curves) / 2)
    axes.axvline(n_positions, color="grey", linewidth=0.8)
    axes.annotate(
        "n_positions",
        (n_positions, axes.get_ylim()[1]),
        ha="right",
        va="top",
        rotation=90,
        fontsize=8,
    )
    axes.set(
        xlabel="step (tokens before this one)",
        ylabel="seconds per token",
        title=title,
        yscale="log",
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def draw_comparison(results: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw new tokens per second: a group per workload and dtype, a bar per program."""
    programs = list(dict.fromkeys(result["program"] for result in results))
    groups = list(dict.fromkeys((result["workload"], result["dtype"]) for result in results))
    figure, axes = _figure(10, 5)
    width = 0.8 / len(programs)
    for number, program in enumerate(programs):
        rates = {
            (r["workload"], r["dtype"]): r["tokens_per_s"]
            for r in results
            if r["program"] == program
        }
        indices = [i for i, group in enumerate(groups) if group in rates]
        bars = axes.bar(
            [i + (number - (len(programs) - 1) / 2) * width for i in indices],
            [rates[groups[i]] for i in indices],
            width,
            label=program,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(groups)), [f"{workload}\n{dtype}" for workload, dtype in groups])
    axes.set(ylabel="new tokens per second", title=title)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")
