"""The section that compares two runs: figures, settings, and the rows that differ.

`audit.diff` pairs and compares the rows. Of the rows that differ, the report shows those with the
smallest hashes of their ids, so that two reports on the same runs show the same rows.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from gptbatch.pipeline.audit.diff import (
    DiffSummary,
    RowDifference,
    SettingDifference,
    diff_runs,
    settings_that_differ,
    summarize,
)
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.report import series, svg
from gptbatch.pipeline.report.compare_figures import figure_tables
from gptbatch.pipeline.report.document import Section, render, template_text, to_json
from gptbatch.pipeline.report.part_facts import value_text
from gptbatch.pipeline.report.row_sample import Row, fit
from gptbatch.pipeline.report.run_columns import row_hash
from gptbatch.pipeline.report.run_view import RunView

MAX_PAIRS = 200
MAX_ONLY_IN_ONE = 20
MAX_PAIR_BYTES = 600_000
NEAR_TIE = 1e-3
# Of the text before the first difference; below MIN_TEXT_CHARACTERS, so that no cut hides it.
_EQUAL_CHARACTERS = 100
# The columns that compare.js shows.
_COLUMNS = (
    "prompt_id",
    "sample_index",
    "prompt_index",
    "completion_tokens",
    "finish_reason",
    "stop_reason",
    "error",
    "min_decision_margin",
)
_TEXTS = ("prompt", "completion")
_Key = tuple[str, int]


@dataclass
class _Differences:
    """Collects the differences of two runs.

    Attributes:
        token_indices: Index of the first token that differs, of all rows whose tokens differ.
        near_ties: Number of them with a margin below NEAR_TIE in one of the runs.
        only: The first ids that only one run has, with the run.
        only_in_a: Hashes of all samples that only run A has.
        only_in_b: The same of run B.
    """

    token_indices: array[int] = field(default_factory=lambda: array("i"))
    near_ties: int = 0
    only: list[tuple[str, RowDifference]] = field(default_factory=list)
    only_in_a: array[int] = field(default_factory=lambda: array("Q"))
    only_in_b: array[int] = field(default_factory=lambda: array("Q"))
    _kept: list[tuple[int, int, RowDifference]] = field(default_factory=list)

    def passing(self, differences: Iterable[RowDifference]) -> Iterator[RowDifference]:
        """Yield differences, and collect them."""
        for number, difference in enumerate(differences):
            self._add(number, difference)
            yield difference

    def sample(self) -> list[RowDifference]:
        """Return the rows to show, in the order of their hashes."""
        return [one for _, _, one in sorted(self._kept, key=lambda kept: -kept[0])]

    def _add(self, number: int, difference: RowDifference) -> None:
        if difference.kind == "logits":
            return
        hashed = row_hash(difference.prompt_id, difference.sample_index)
        if difference.kind in ("only_in_a", "only_in_b"):
            (self.only_in_a if difference.kind == "only_in_a" else self.only_in_b).append(hashed)
            if len(self.only) < MAX_ONLY_IN_ONE:
                self.only.append((difference.kind[-1].upper(), difference))
            return
        if difference.kind == "tokens" and difference.token_index is not None:
            self.token_indices.append(difference.token_index)
            self.near_ties += _smaller_margin(difference) < NEAR_TIE
        # A heap with the largest hash on top.
        entry = (-hashed, number, difference)
        if len(self._kept) < MAX_PAIRS:
            heapq.heappush(self._kept, entry)
        elif hashed < -self._kept[0][0]:
            heapq.heapreplace(self._kept, entry)


def compare_section(a: RunView, b: RunView, *, with_text: bool) -> tuple[DiffSummary, Section]:
    """Return the counts of the diff, and the section that compares run B with run A.

    Raises:
        StorageError: A part cannot be read, or a run holds an id twice.
    """
    found = _Differences()
    summary = summarize(a.run, b.run, found.passing(diff_runs(a.run, b.run)))
    pairs, characters = _pairs(a.run, b.run, found.sample(), with_text=with_text)
    html = render(
        "compare.html",
        names=(str(a.run.path), str(b.run.path)),
        states=(a.ended, b.ended),
        summary=summary,
        verdict=_verdict(summary),
        tables=figure_tables(a, b, found.only_in_a, found.only_in_b, summary),
        settings=[_shown(one) for one in settings_that_differ(a.run, b.run)],
        environments={"A": len(a.run.environments), "B": len(b.run.environments)},
        near_ties=found.near_ties,
        near_tie=NEAR_TIE,
        tokens_differ=len(found.token_indices),
        chart=svg.both_widths(
            partial(_draw_first_differences, found.token_indices, summary.unit),
            (540, 170),
            (340, 150),
        )
        if found.token_indices
        else None,
        only=[(run, one.prompt_id, one.sample_index) for run, one in found.only],
        shown=len(pairs),
        with_text=with_text,
    )
    section = Section(
        id="compare",
        title="Two runs",
        html=html,
        data={
            "pairs": pairs,
            "unit": summary.unit,
            "cut": characters,
            "with_text": with_text,
        },
        script=template_text("compare.js"),
    )
    return summary, section


def _verdict(summary: DiffSummary) -> str:
    if not summary.common:
        return f"no {summary.unit} are in both runs"
    return f"all {summary.unit} are equal" if summary.all_equal else f"{summary.unit} differ"


def _smaller_margin(difference: RowDifference) -> float:
    margins = (difference.min_decision_margin_a, difference.min_decision_margin_b)
    return min((margin for margin in margins if margin is not None), default=math.inf)


def _shown(difference: SettingDifference) -> tuple[str, str, str]:
    return difference.name, value_text(difference.a), value_text(difference.b)


def _draw_first_differences(indices: array[int], unit: str, size: tuple[int, int]) -> Markup:
    edges, counts = series.linear_histogram(np.array(indices, np.int32))
    plot = svg.Plot(
        svg.number_axis(float(edges[-1]), float(edges[0]), 8),
        svg.number_axis(float(counts.max()), count=3),
        size=size,
        title="First token that differs",
        description=f"{len(indices):,} {unit}.",
    )
    plot.bars(edges, counts, "c4", series.bin_labels(edges, counts, "as index"))
    return plot.markup()


def _pairs(
    a: RunReader, b: RunReader, differences: list[RowDifference], *, with_text: bool
) -> tuple[list[dict[str, Any]], int]:
    """Return rows that differ, with both texts, and the length of cut texts.

    Args:
        a: Run A.
        b: Run B.
        differences: The rows. Where not all fit, the last ones are left out.
        with_text: Whether prompts and completions are read.
    """
    keys = [(one.prompt_id, one.sample_index) for one in differences]
    left, right = (_rows(run, set(keys), with_text=with_text) for run in (a, b))
    items = [list(_without_equal_texts(left[key], right[key])) for key in keys]
    facts: list[dict[str, Any]] = [
        {
            "kind": one.kind,
            "token_index": one.token_index,
            "token_a": one.token_a,
            "token_b": one.token_b,
            "margin": None if math.isinf(margin := _smaller_margin(one)) else margin,
            "same_prompt": left[key].get("prompt") == right[key].get("prompt"),
            "a": None,
            "b": None,
        }
        for key, one in zip(keys, differences, strict=True)
    ]
    fitted, characters = fit(items, MAX_PAIR_BYTES - len(to_json(facts).encode()))
    # `fit` leaves out the last items.
    pairs = [
        {**fact, "a": row_a, "b": row_b}
        for fact, (row_a, row_b) in zip(facts, fitted, strict=False)
    ]
    pairs.sort(key=lambda pair: (pair["a"]["prompt_index"], pair["a"]["sample_index"]))
    return pairs, characters


def _rows(run: RunReader, keys: set[_Key], *, with_text: bool) -> dict[_Key, Row]:
    """Return the rows of a run with these ids and samples."""
    ids = pa.array(sorted({prompt_id for prompt_id, _ in keys}), pa.string())
    places: list[int] = []
    first = 0
    for batch in run.batches(["prompt_id", "sample_index"]):
        for offset in pc.indices_nonzero(pc.is_in(batch["prompt_id"], value_set=ids)).to_pylist():
            key = (batch["prompt_id"][offset].as_py(), batch["sample_index"][offset].as_py() or 0)
            if key in keys:
                places.append(first + offset)
        first += len(batch)
    rows = {}
    for row in run.row_reader((*_COLUMNS, *(_TEXTS if with_text else ()))).take(places):
        row["sample_index"] = row["sample_index"] or 0
        present = {name: value for name, value in row.items() if value is not None}
        rows[row["prompt_id"], row["sample_index"]] = present
    return rows


def _without_equal_texts(a: Row, b: Row) -> tuple[Row, Row]:
    """Return two rows with an equal prompt once, and less text before their first difference.

    `skipped` counts the characters left out, and `equal` those before the first difference, as
    JavaScript counts them.
    """
    texts = [row.get("completion", "") for row in (a, b)]
    pairs = enumerate(zip(*texts, strict=False))
    equal = next((index for index, (x, y) in pairs if x != y), min(map(len, texts)))
    skipped = max(0, equal - _EQUAL_CHARACTERS)
    units = len(texts[0][skipped:equal].encode("utf-16-le", "surrogatepass")) // 2
    shared = {"equal": units, "skipped": skipped}
    rows = [
        {**row, **shared, **({"completion": text[skipped:]} if "completion" in row else {})}
        for row, text in zip((a, b), texts, strict=True)
    ]
    if a.get("prompt") == b.get("prompt"):
        rows[1].pop("prompt", None)
    return rows[0], rows[1]
