"""The tables of figures of two runs, with the change from one to the other."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np

from gptbatch.pipeline.audit.diff import DiffSummary
from gptbatch.pipeline.report import series, svg
from gptbatch.pipeline.report.run_columns import Floats, RunColumns, row_hashes
from gptbatch.pipeline.report.run_view import RunView

# The header, and the rows.
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
_Rows = slice | np.ndarray[Any, np.dtype[np.bool_]]


def figure_tables(
    a: RunView, b: RunView, only_in_a: array[int], only_in_b: array[int], summary: DiffSummary
) -> list[Table]:
    """Return one table if both runs have the same samples, else one of the whole runs.

    A table of the samples that both have follows the latter. Only figures of the same samples show
    changes.

    Args:
        a: Run A.
        b: Run B.
        only_in_a: Hashes of the samples that only run A has.
        only_in_b: The same of run B.
        summary: The counts of the diff.

    Raises:
        StorageError: A part cannot be read.
    """
    unit = summary.unit
    run_a, run_b = (_run_figures(view, unit) for view in (a, b))
    whole_runs: Table = (("whole runs", "A", "B"), _side_by_side(run_a, run_b))
    if not summary.common:
        return [whole_runs]
    both_a, both_b = (
        _sample_figures(view.columns, _rows_in_both(view, alone), unit)
        for view, alone in ((a, only_in_a), (b, only_in_b))
    )
    with_change = ("A", "B", "change")
    if not (summary.missing_in_a or summary.missing_in_b):
        return [(("", *with_change), _with_changes(run_a | both_a, run_b | both_b))]
    return [whole_runs, ((f"{unit} in both", *with_change), _with_changes(both_a, both_b))]


def _run_figures(view: RunView, unit: str) -> dict[str, float]:
    """Return the figures of a whole run."""
    totals, nan = view.totals, math.nan
    return {
        unit: totals.rows,
        f"error {unit}": totals.error_rows,
        "new tokens": totals.new_tokens,
        "new tokens/s": nan if totals.tokens_per_s is None else totals.tokens_per_s,
        "time of work": nan if totals.active_s is None else totals.active_s,
    }


def _sample_figures(columns: RunColumns, rows: _Rows, unit: str) -> dict[str, float]:
    """Return the figures of rows of the table."""

    def median(values: Floats) -> float:
        return series.distribution(values[rows]).quantiles[0]

    is_error = np.array([name == "error" for name in columns.end_names], bool)
    new = columns.completion_tokens[rows]
    ran = new[np.isfinite(columns.started_s[rows])]
    mean = float(ran.mean()) if len(ran) else math.nan
    return {
        f"error {unit}": int(is_error[columns.ends[rows]].sum()),
        "new tokens": int(new.sum(dtype=np.int64)),
        f"new tokens per {unit.removesuffix('s')}, mean": mean,
        "queue, time p50": median(columns.queue_s),
        "prefill, time p50": median(columns.prefill_s),
        "decode, time p50": median(columns.decode_s),
        "decision margin, p50": median(columns.margins),
    }


def _rows_in_both(view: RunView, alone: array[int]) -> _Rows:
    """Return which rows of a run the other run has, too.

    Args:
        view: The run.
        alone: The hashes of the others.
    """
    if not alone:
        return slice(None)
    return np.isin(row_hashes(view.run), np.frombuffer(alone, np.uint64), invert=True)


def _side_by_side(a: dict[str, float], b: dict[str, float]) -> list[tuple[str, ...]]:
    return [(name, _form(name, value), _form(name, b[name])) for name, value in a.items()]


def _with_changes(a: dict[str, float], b: dict[str, float]) -> list[tuple[str, ...]]:
    return [(*row, _change(a[row[0]], b[row[0]])) for row in _side_by_side(a, b)]


def _form(name: str, value: float) -> str:
    if not math.isfinite(value):
        return ""
    if "time" in name:
        return svg.duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _change(a: float, b: float) -> str:
    if not (math.isfinite(a) and math.isfinite(b)):
        return ""
    if a == b:
        return "equal"
    return f"{b / a - 1:+.1%}" if a else ""
