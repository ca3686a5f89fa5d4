"""Chooses the rows that the report shows, and reads their texts.

They are a sample by a hash of the id, the rows with errors, and the extremes: the slowest, the
longest, and those with the smallest decision margins. The sample of two runs of one input is
therefore the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, zip_longest
from typing import Any

import numpy as np

from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.output.schema import SCHEMA
from gptbatch.pipeline.report.document import moment, to_json
from gptbatch.pipeline.report.run_columns import Floats, RunColumns
from gptbatch.pipeline.report.series import blocks

EXTREME_ROWS = 10
MAX_ERROR_ROWS = 200
MAX_TEXT_CHARACTERS = 4096
MIN_TEXT_CHARACTERS = 256
MAX_TOKEN_LOGPROBS = 512
# Of the JSON of all rows. The rest of a report takes about 150 KB.
MAX_BYTES = 1_500_000
# Not the id, which names the row in commands.
_TEXTS = ("prompt", "completion", "metadata", "error", "sampling_params")
# Large, and without meaning for a reader, or shown in another form.
# started_at is added from the columns: Arrow would import pandas for it.
_LEFT_OUT = ("completion_token_ids", "top_logprob_ids", "top_logprobs", "started_at")

Row = dict[str, Any]


def choose_rows(columns: RunColumns) -> dict[int, list[str]]:
    """Return the indices of rows in ascending order, with the groups that each belongs to."""
    groups: dict[int, list[str]] = {}

    def add(name: str, rows: Iterable[int]) -> None:
        for row in rows:
            groups.setdefault(int(row), []).append(name)

    add("sample", columns.sample)
    # A row of each reason, then a second one, so that rare reasons are shown, too.
    ranks = zip_longest(*(group.rows for group in columns.errors))
    errors = [row for rank in ranks for row in rank if row is not None]
    add("error", errors[:MAX_ERROR_ROWS])
    n = len(columns)
    add("slowest", _largest(lambda rows: columns.prefill_s[rows] + columns.decode_s[rows], n))
    add("longest", _largest(lambda rows: columns.completion_tokens[rows].astype(np.float64), n))
    add("smallest margin", _largest(lambda rows: -columns.margins[rows], n))
    return dict(sorted(groups.items()))


def read_rows(run: RunReader, groups: Mapping[int, list[str]], *, with_text: bool) -> list[Row]:
    """Return rows for the data of the report.

    Args:
        run: The run.
        groups: Groups by row index, in ascending order.
        with_text: Whether prompts, completions and metadata are read.

    Raises:
        StorageError: A part cannot be read.
    """
    left_out = (*_LEFT_OUT, *(() if with_text else ("prompt", "completion", "metadata")))
    names = [name for name in SCHEMA.names if name not in left_out]
    reader = run.row_reader(names)
    rows = []
    for row, names_of_groups in zip(reader.take(list(groups)), groups.values(), strict=True):
        row["groups"] = names_of_groups
        row["sample_index"] = row["sample_index"] or 0
        # JavaScript rounds integers above 2^53.
        row["seed"] = str(row["seed"])
        if row["token_logprobs"] is not None:
            row["token_logprobs"] = [
                round(value, 3) for value in row["token_logprobs"][:MAX_TOKEN_LOGPROBS]
            ]
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def fit(items: list[list[Row]], max_bytes: int = MAX_BYTES) -> tuple[list[list[Row]], int]:
    """Cut texts, and leave out the last items, until all fit into a number of bytes as JSON.

    Args:
        items: Rows that belong together.
        max_bytes: The most bytes.

    Returns:
        The items that are kept, and the number of characters to which longer texts are cut.
    """
    characters = MAX_TEXT_CHARACTERS
    while True:
        cut = [[_cut(row, characters) for row in item] for item in items]
        sizes = [sum(map(_size, item)) for item in cut]
        if sum(sizes) <= max_bytes:
            return cut, characters
        if characters <= MIN_TEXT_CHARACTERS:
            break
        characters //= 2
    totals = accumulate(sizes)
    return [item for item, total in zip(cut, totals, strict=True) if total <= max_bytes], characters


def browsed_rows(
    run: RunReader, columns: RunColumns, *, with_text: bool, max_bytes: int = MAX_BYTES
) -> tuple[list[Row], int]:
    """Return the rows of the browser in the order of the run, and the length of cut texts.

    Where not all fit into `max_bytes` of JSON, the errors and the extremes come before the rest of
    the sample.
    """
    groups = choose_rows(columns)
    rows = read_rows(run, groups, with_text=with_text)
    for index, row in zip(groups, rows, strict=True):
        if np.isfinite(started_s := float(columns.started_s[index])):
            row["started_at"] = moment(started_s)
    rows.sort(key=lambda row: row["groups"] == ["sample"])
    fitted, characters = fit([[row] for row in rows], max_bytes)
    kept = [row for (row,) in fitted]
    return sorted(kept, key=lambda row: (row["prompt_index"], row["sample_index"])), characters


def _cut(row: Row, characters: int) -> Row:
    """Return a row with shorter texts, and their whole lengths in `cut`."""
    lengths = {
        name: len(row[name])
        for name in _TEXTS
        if isinstance(row.get(name), str) and len(row[name]) > characters
    }
    if not lengths:
        return row
    return {**row, **{name: row[name][:characters] for name in lengths}, "cut": lengths}


def _size(row: Row) -> int:
    return len(to_json(row).encode())


def _largest(values: Callable[[slice], Floats], n: int, count: int = EXTREME_ROWS) -> list[int]:
    """Return the rows with the largest finite values; the first of equal ones.

    Args:
        values: Returns the values of a block of rows.
        n: Number of rows.
        count: Number of rows to return.
    """
    best: list[tuple[float, int]] = []
    for block in blocks(n):
        found = values(block)
        rows = np.flatnonzero(np.isfinite(found))
        if len(rows) > count:
            limit = np.partition(found[rows], len(rows) - count)[len(rows) - count]
            rows = rows[found[rows] >= limit]
        best += [(-float(found[row]), block.start + int(row)) for row in rows]
        best = sorted(best)[:count]
    return [row for _, row in best]
