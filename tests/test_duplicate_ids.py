"""Repeated ids: the hashes of the first pass, in memory and in a file, and the rows they name."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.input.duplicate_ids import IdHashes, id_hash, position_of_hash

IDS = st.one_of(
    st.integers(0, 40).map(str),
    st.integers(0, 2**70).map(str),
    st.sampled_from(["a", "b", "007", "0", "00", "-1", "1.0", "\u0663", "line:3", "x" * 30]),
)


def rows_of(ids: list[str | None]) -> list[tuple[str, int]]:
    """Return the id of each row, and its position; None is the default id."""
    return [(str(index) if own is None else own, index) for index, own in enumerate(ids)]


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.none() | IDS, max_size=60), max_in_memory=st.sampled_from([1, 7, 1000]))
def test_repeated_ids_are_found_in_memory_and_in_buckets(
    ids: list[str | None], max_in_memory: int
) -> None:
    rows, hashes = rows_of(ids), IdHashes(max_in_memory)
    for prompt_id, position in rows:
        hashes.add(prompt_id, position)
    counts = Counter(prompt_id for prompt_id, _ in rows)
    expected = {id_hash(prompt_id) for prompt_id, count in counts.items() if count > 1}
    assert hashes.repeated() == expected


@settings(max_examples=50, deadline=None)
@given(
    ids=st.lists(st.none() | IDS, max_size=60),
    borders=st.lists(st.integers(0, 60), max_size=4),
    max_in_memory=st.sampled_from([3, 1000]),
)
def test_ids_of_pieces_are_merged(
    ids: list[str | None], borders: list[int], max_in_memory: int
) -> None:
    rows, whole, merged = rows_of(ids), IdHashes(), IdHashes(max_in_memory)
    for row in rows:
        whole.add(*row)
    bounds = [0, *sorted(min(border, len(rows)) for border in borders), len(rows)]
    for first, end in pairwise(bounds):
        piece = IdHashes()
        for row in rows[first:end]:
            piece.add(*row)
        merged.merge(*piece.take())
    assert merged.repeated() == whole.repeated()


def test_rows_without_own_ids_are_not_kept() -> None:
    hashes = IdHashes()
    for position in range(1000):
        hashes.add(str(position), position)
    own, ranges = hashes.take()
    assert (own, len(ranges)) == (b"", 16)


def test_positions_that_come_again_are_repeated() -> None:
    """A split may be read twice: train+train."""
    hashes = IdHashes()
    for position in (0, 1, 2, 0, 1):
        hashes.add(str(position), position)
    assert hashes.repeated() == {id_hash("0"), id_hash("1")}


@pytest.mark.parametrize("position", [0, 1, 511, 2**59])
def test_the_hash_of_a_number_gives_it_back(position: int) -> None:
    assert position_of_hash(id_hash(str(position))) == position


# -- trusted ids -----------------------------------------------------------------------------------


def job(checkpoint: Path, folder: Path, rows: list[dict[str, str]], ids: Any) -> JobConfig:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JobConfig(
        model=str(checkpoint),
        input=str(folder / "a.jsonl"),
        output=str(folder / "out"),
        max_new_tokens=4,
        ids=ids,
    )


def test_rows_with_one_trusted_id_have_one_seed(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"id": name, "prompt": "x"} for name in ("same", "b", "same")]
    with pytest.raises(InputRowsError, match="id 'same' was already used on line 1"):
        run_job(job(checkpoint, tmp_path, rows, "checked"))
    assert run_job(job(checkpoint, tmp_path, rows, "trusted")).ok == 3
    table = pq.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()
    first, other, last = ((row["seed"], row["completion"]) for row in table)
    assert first == last != other


def test_trusted_ids_are_the_same_job(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}]
    first = run_job(job(checkpoint, tmp_path, rows, "trusted"))
    again = run_job(job(checkpoint, tmp_path, rows, "checked"))
    assert (again.rows_kept, again.config_hash) == (2, first.config_hash)
