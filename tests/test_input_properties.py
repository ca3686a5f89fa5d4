"""Random small datasets of common libraries: rows are read as written, or rejected."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptbatch.pipeline.errors import InputRowsError
from tests.test_input_files import metadata, read

Row = dict[str, Any]

texts = st.one_of(
    st.sampled_from(
        ["", "NA", "None", "null", "nan", "007", "1984", "1.0", "true", "2024-01-02", " a ", "a,b"]
    ),
    st.sampled_from(['say "a"', '"', "a\nb", "a\r\nb", "'", "\\"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8),
)
seeds = st.one_of(st.none(), st.integers(0, 2**63 - 1))
notes = st.one_of(st.none(), texts)
typed_notes: list[st.SearchStrategy[Any]] = [
    notes,
    st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
    # pandas writes 15 digits, which round the largest numbers up to infinity
    st.one_of(st.none(), st.floats(-1e300, 1e300)),
    st.one_of(st.none(), st.booleans()),
    st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=3)),
]


@st.composite
def tables(draw: st.DrawFn, typed: bool) -> list[Row]:
    """Generate rows with one type per field. Ids are unique, or missing from all rows."""
    note = draw(st.sampled_from(typed_notes)) if typed else notes
    rows = draw(
        st.lists(
            st.fixed_dictionaries({"prompt": texts, "seed": seeds, "note": note}),
            min_size=1,
            max_size=4,
        )
    )
    if draw(st.booleans()):
        ids = draw(
            st.lists(texts.filter(bool), min_size=len(rows), max_size=len(rows), unique=True)
        )
        rows = [{"id": name, **row} for name, row in zip(ids, rows, strict=True)]
    return rows


def frame(rows: list[Row]) -> pd.DataFrame:
    """Build a frame with nullable integers, so that integers beside nulls stay integers."""
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    return pd.DataFrame({**columns, "seed": pd.array(columns["seed"], dtype="Int64")})


def by_csv_module(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def by_arrow_file(rows: list[Row], path: Path) -> None:
    with pa.ipc.new_file(path, table(rows).schema) as writer:
        writer.write_table(table(rows))


def by_arrow_stream(rows: list[Row], path: Path) -> None:
    with pa.ipc.new_stream(path, table(rows).schema) as writer:
        writer.write_table(table(rows))


def polars_frame(rows: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema_overrides={"seed": pl.Int64}, infer_schema_length=None)


TEXT_WRITERS: dict[str, tuple[str, Callable[[list[Row], Path], Any]]] = {
    "csv module": ("rows.csv", by_csv_module),
    "pandas csv": ("rows.csv", lambda rows, path: frame(rows).to_csv(path, index=False)),
    "pandas tsv": ("rows.tsv", lambda rows, path: frame(rows).to_csv(path, index=False, sep="\t")),
    "pandas csv, compressed": (
        "rows.csv.gz",
        lambda rows, path: frame(rows).to_csv(path, index=False),
    ),
    "polars csv": ("rows.csv", lambda rows, path: polars_frame(rows).write_csv(path)),
}
TYPED_WRITERS: dict[str, tuple[str, Callable[[list[Row], Path], Any]]] = {
    "json array": ("rows.json", lambda rows, path: path.write_text(json.dumps(rows))),
    "json lines": (
        "rows.jsonl",
        lambda rows, path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    ),
    "pandas jsonl": (
        "rows.jsonl",
        lambda rows, path: frame(rows).to_json(
            path, orient="records", lines=True, double_precision=15
        ),
    ),
    "polars jsonl": ("rows.ndjson", lambda rows, path: polars_frame(rows).write_ndjson(path)),
    "pandas parquet": ("rows.parquet", lambda rows, path: frame(rows).to_parquet(path)),
    "polars parquet": ("rows.parquet", lambda rows, path: polars_frame(rows).write_parquet(path)),
    "pyarrow parquet": ("rows.parquet", lambda rows, path: pq.write_table(table(rows), path)),
    "feather": ("rows.feather", lambda rows, path: feather.write_feather(table(rows), path)),
    "arrow file": ("rows.arrow", by_arrow_file),
    "arrow stream": ("rows.arrow", by_arrow_stream),
}


def written(
    rows: list[Row], path: Path, write: Callable[[list[Row], Path], Any]
) -> list[tuple[Any, ...]] | None:
    """Return (id, prompt, seed, note) of each row, None where the file is rejected."""
    path.unlink(missing_ok=True)
    write(rows, path)
    try:
        prompts = read(path)
    except InputRowsError:
        return None
    has_seed = [row["seed"] is not None for row in rows]
    return [
        (
            prompt.prompt_id,
            prompt.text,
            prompt.params.seed if own else None,
            (metadata(prompt) or {}).get("note"),
        )
        for prompt, own in zip(prompts, has_seed, strict=True)
    ]


def expected(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [
        (row.get("id", str(place)), row["prompt"], row["seed"], row["note"])
        for place, row in enumerate(rows)
    ]


PROPERTY = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("name", TEXT_WRITERS)
@given(rows=tables(typed=False))
@PROPERTY
def test_rows_of_text_files(tmp_path: Path, name: str, rows: list[Row]) -> None:
    file, write = TEXT_WRITERS[name]
    found = written(rows, tmp_path / file, write)
    if found is None:
        # an empty cell may be a gap, and a CR before LF may belong to the cell or to the line
        assert any(row["prompt"] == "" or "\r" in f"{row}" or "\\r" in f"{row}" for row in rows)
        return
    # these writers leave an empty text and a gap as the same empty cell
    assert [tuple("" if value is None else value for value in row) for row in found] == [
        tuple("" if value is None else value for value in row) for row in expected(rows)
    ]


@pytest.mark.parametrize("name", TYPED_WRITERS)
@given(rows=tables(typed=True))
@PROPERTY
def test_rows_of_typed_files(tmp_path: Path, name: str, rows: list[Row]) -> None:
    file, write = TYPED_WRITERS[name]
    found = written(rows, tmp_path / file, write)
    if found is None:
        # pandas makes floats of integers beside gaps
        assert name.startswith("pandas")
        assert any(isinstance(row["note"], int) for row in rows)
        return
    for row, wanted in zip(found, expected(rows), strict=True):
        assert row[:3] == wanted[:3]
        note = wanted[3]
        if name == "pandas jsonl" and isinstance(note, (int, float)):  # it writes 15 digits
            assert row[3] == pytest.approx(note, rel=1e-9, abs=1e-9)
        elif name.startswith("pandas") and type(note) is int:
            assert row[3] == note or row[3] == float(note)
        else:
            assert row[3] == note
