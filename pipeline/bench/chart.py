"""Draw charts of benchmark results with matplotlib, which is imported where it is used.

All have one style: a title, below it machine and date, units on the axes, linear scales, and
colours that colour-blind readers can tell apart (Okabe and Ito 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from gptbatch.pipeline.bench.scaling import Curve
from gptbatch.pipeline.errors import ConfigError

BLUE, SKY, ORANGE, RED, GREEN, GREY = (
    "#0072B2",
    "#56B4E9",
    "#E69F00",
    "#D55E00",
    "#009E73",
    "#595959",
)
PROGRAM_COLOURS = {
    "gptbatch": BLUE,
    "gptbatch-int8-cache": SKY,
    "openvino": ORANGE,
    "vllm": RED,
    "transformers": GREEN,
}
# Colour and marker of each workload, in order.
WORKLOAD_MARKS = [(BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (RED, "D")]
DPI = 150
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}
# Outliers above this many times the median are cut off: other programs on the machine.
MAX_SHOWN = 2.5


def check_matplotlib() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ConfigError("charts need matplotlib; install gptbatch[bench]") from error


def describe_measurement(described: dict[str, Any], *more: str) -> str:
    """Return the line below a title: settings, threads, machine, and date.

    Args:
        described: The result of `describe_machine`.
        more: Comes first, such as the name of the model.
    """
    threads = described["threads"]
    return ", ".join(
        [
            *more,
            f"{threads} thread{'s' * (threads != 1)} of {described['machine']}",
            *([described["date"]] if "date" in described else []),
        ]
    )


def draw_scaling(curves: Sequence[Curve], path: Path, *, n_positions: int, measured: str) -> None:
    """Draw the time of one more token: without a cache on the left, with the cache on the right.

    Args:
        curves: The result of `measure_scaling`.
        path: The PNG to write.
        n_positions: Length of the context.
        measured: The line below the title.
    """
    by_name = {curve.name: curve for curve in curves}
    figure, (left, right) = _figure(10, 4.4, columns=2)
    naive, cached, slide = by_name["naive"], by_name["cached"], by_name["slide"]
    _draw_points(left, naive, 1, RED, "measured")
    _draw_fit(left, naive.linear, n_positions, 1, "--", "linear fit")
    _draw_fit(left, naive.quadratic, n_positions, 1, "-", "quadratic fit")
    left.set(title="Without a cache: the whole context again", ylabel="seconds per token")
    _draw_points(right, cached, 1e3, BLUE, "KV cache")
    _draw_points(right, slide, 1e3, GREEN, "KV cache, window_full: slide")
    _draw_fit(right, cached.linear, n_positions, 1e3, "--", "linear fit of the KV cache")
    median_ms = 1e3 * float(np.median(cached.seconds))
    right.set(
        title="With the KV cache: one token",
        ylabel="milliseconds per token",
        ylim=(0, MAX_SHOWN * median_ms),
    )
    if beyond := [s for n, s in zip(slide.steps, slide.seconds, strict=True) if n >= n_positions]:
        right.annotate(
            f"slide beyond the context:\n{1e3 * float(np.median(beyond)):.0f} ms",
            (n_positions, MAX_SHOWN * median_ms),
            (-8, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            color=GREEN,
        )
    for axes in (left, right):
        axes.axvline(n_positions, color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="tokens before this one", xlim=(0, None))
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left" if axes is left else "lower left", fontsize=9)
    figure.suptitle(f"Time of one more token as the context grows\n{measured}", fontsize=11)
    figure.savefig(path, dpi=DPI)


def draw_comparison(results: Sequence[dict[str, Any]], path: Path, *, measured: str) -> None:
    """Draw new tokens per second: a panel per dtype, a group per workload, a bar per program.

    Args:
        results: One per workload, dtype and program.
        path: The PNG to write.
        measured: The line below the title.
    """
    programs = list(dict.fromkeys(result["program"] for result in results))
    workloads = list(dict.fromkeys(result["workload"] for result in results))
    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    figure, panels = _figure(11, 4.6, columns=len(dtypes))
    for axes, dtype in zip(np.atleast_1d(panels), dtypes, strict=True):
        rates = {
            (result["workload"], result["program"]): result["tokens_per_s"]
            for result in results
            if result["dtype"] == dtype
        }
        for group, workload in enumerate(workloads):
            # A program that a workload lacks leaves no gap.
            present = [program for program in programs if (workload, program) in rates]
            width = 0.84 / max(1, len(present))
            for number, program in enumerate(present):
                bar = axes.bar(
                    group + (number - (len(present) - 1) / 2) * width,
                    rates[workload, program],
                    width * 0.94,
                    color=PROGRAM_COLOURS.get(program, GREY),
                    label=program,
                )
                axes.bar_label(bar, fmt="%.0f", fontsize=9)
        axes.set_xticks(range(len(workloads)), [name.replace("_", " ") for name in workloads])
        axes.set(title=dtype, ylabel="new tokens per second")
        axes.tick_params(axis="x", length=0)
    handles = {
        label: handle
        for axes in np.atleast_1d(panels)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [handles[program] for program in programs],
        programs,
        loc="outside lower center",
        ncols=len(programs),
    )
    figure.suptitle(f"Throughput by workload: more is better\n{measured}", fontsize=11)
    figure.savefig(path, dpi=DPI)


def draw_ablation(results: Sequence[dict[str, Any]], path: Path, *, measured: str) -> None:
    """Draw the speed-up of each optimization: a panel per dtype, a point per workload.

    A point is the median of the pairs; its line reaches from the smallest to the largest ratio.

    Args:
        results: One per workload, dtype and optimization, as benchmarks/ablation writes them.
        path: The PNG to write.
        measured: The line below the title.
    """
    found = [result for result in results if result.get("applies") and "ratios" in result]
    labels = list(dict.fromkeys(result["label"] for result in found))
    workloads = list(dict.fromkeys(result["workload"] for result in found))
    dtypes = list(dict.fromkeys(result["dtype"] for result in found))
    figure, panels = _figure(11, 1.6 + 0.45 * len(labels), columns=len(dtypes), sharey=True)
    for axes, dtype in zip(np.atleast_1d(panels), dtypes, strict=True):
        for number, workload in enumerate(workloads):
            shown = [r for r in found if (r["dtype"], r["workload"]) == (dtype, workload)]
            speed_ups = np.array([result["speed_up"] for result in shown])
            lowest, highest = ([f(r["ratios"]) for r in shown] for f in (min, max))
            colour, marker = WORKLOAD_MARKS[number % len(WORKLOAD_MARKS)]
            axes.errorbar(
                speed_ups,
                [
                    labels.index(r["label"]) + 0.22 * (number - (len(workloads) - 1) / 2)
                    for r in shown
                ],
                xerr=(speed_ups - lowest, highest - speed_ups),
                fmt=marker,
                markersize=5,
                elinewidth=1,
                color=colour,
                label=workload.replace("_", " "),
            )
        axes.axvline(1, color=GREY, linewidth=1)
        axes.set(title=dtype, xlabel="speed with it on / speed with it off")
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    first = np.atleast_1d(panels)[0]
    first.invert_yaxis()
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.suptitle(f"Gain of each optimization: right of 1 is faster\n{measured}", fontsize=11)
    figure.savefig(path, dpi=DPI)


def _draw_points(axes: Any, curve: Curve, unit: float, colour: str, label: str) -> None:
    seconds = np.array(curve.seconds) * unit
    axes.plot(curve.steps, seconds, ".", markersize=4, color=colour, label=label)


def _draw_fit(
    axes: Any, coefficients: list[float], n_positions: int, unit: float, style: str, label: str
) -> None:
    x = np.linspace(1, n_positions, 200)
    y = np.polyval(coefficients, x) * unit
    axes.plot(x, y, style, linewidth=1.5, color=GREY, label=label)


def _figure(width: float, height: float, *, columns: int, sharey: bool = False) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.style.use(STYLE)
    size = (width, height)
    return plt.subplots(1, columns, figsize=size, sharey=sharey, layout="constrained")
