"""Shards of the check of an input: their pieces are joined to the index of one whole check."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbatch.pipeline import ConfigError, JobConfig, plan_job, run_job
from gptbatch.pipeline.cluster import plan_shard
from gptbatch.pipeline.cluster.plan import Plan
from gptbatch.pipeline.errors import GptbatchError, InputRowsError, StorageError
from gptbatch.pipeline.input import input_digest, row_count
from gptbatch.pipeline.input.duplicate_ids import id_hash
from gptbatch.pipeline.input.input_files import InputFiles
from gptbatch.pipeline.input.row_count import RowCount
from gptbatch.pipeline.output import index_piece
from gptbatch.pipeline.output.index_file import INDEX
from tests.conftest import run_gptbatch

ROWS = [{"id": f"r{i}", "prompt": f"{i} The king", "note": i} for i in range(120)]


def text_of(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_input(folder: Path, *files: tuple[str, Sequence[Any]]) -> Path:
    """Write files of rows; the suffix of a name says how."""
    folder.mkdir(exist_ok=True)
    for name, rows in files:
        path = folder / name
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=7)
        elif path.suffix == ".gz":
            path.write_bytes(gzip.compress(text_of(rows)))
        elif path.suffix == ".zst":
            path.write_bytes(zstandard.compress(text_of(rows)))
        else:
            path.write_bytes(b"\xef\xbb\xbf" + text_of(rows) + b"\n \n")
    return folder


def write_mixed(folder: Path) -> Path:
    """Write files whose borders lie inside of parts, one of them without rows."""
    return write_input(
        folder,
        ("0.jsonl", ROWS[:23]),
        ("1.jsonl.gz", ROWS[23:55]),
        ("2.jsonl", []),
        ("3.parquet", ROWS[55:90]),
        ("4.jsonl.zst", ROWS[90:]),
    )


def job(source: Path, output: Path, **more: Any) -> JobConfig:
    settings = {"model": "none", "part_rows": 10, **more}
    return JobConfig(input=str(source), output=str(output), **settings)


def shard_of(config: JobConfig, index: int, count: int) -> JobConfig:
    return config.model_copy(update={"shard": f"{index}/{count}"})


def plan_shards(config: JobConfig, count: int, order: list[int] | None = None) -> list[Plan]:
    return [plan_job(shard_of(config, index, count)) for index in order or range(count)]


def index_of(output: Path) -> bytes:
    return (output / ".gptbatch" / INDEX).read_bytes()


def pieces_of(output: Path) -> list[str]:
    return sorted(path.name for path in (output / ".gptbatch").glob("input_index.*-of-*"))


def check_same(config: JobConfig, tmp_path: Path, count: int) -> Plan:
    """Check that shards write the index of a whole check. Returns the plan."""
    whole = plan_job(config.model_copy(update={"output": str(tmp_path / "whole")}))
    *first, last = plan_shards(config, count, [*range(1, count), 0])
    assert not any(plan.complete for plan in first)
    assert {(plan.rows, plan.parts, plan.part_rows) for plan in first} <= {
        (whole.rows, whole.parts, whole.part_rows)
    }
    assert {plan.input_digest for plan in first} <= {None}
    output = Path(config.output)
    assert last == Plan(
        output=config.output,
        rows=whole.rows,
        bad_rows=whole.bad_rows,
        part_rows=whole.part_rows,
        parts=whole.parts,
        input_digest=whole.input_digest,
        complete=True,
    )
    assert index_of(output) == index_of(tmp_path / "whole")
    assert pieces_of(output) == []
    return last


@pytest.mark.parametrize("count", [2, 5, 30])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_shards_write_the_index_of_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    monkeypatch.setattr(row_count, "CHUNK_BYTES", 300)
    source = write_input(tmp_path / "in", (name, ROWS)) / name
    assert check_same(job(source, tmp_path / "out"), tmp_path, count).rows == 120


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"part_rows": 7},
        {"part_rows": 1},
        {"part_rows": None},
        {"limit": 57},
        {"limit": 60},
        {"limit": 0},
        {"limit": 1000},
        {"skip_row": ["r3", "r119"]},
        {"id_field": ""},
    ],
)
def test_shards_write_the_index_of_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(index_piece, "_IDS_PER_ROW_GROUP", 20)
    config = job(write_mixed(tmp_path / "in"), tmp_path / "out", **settings)
    check_same(config, tmp_path, 4)


def test_the_rule_for_large_inputs_follows_from_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_digest, "BLOCK_ROWS", 8)
    monkeypatch.setattr(input_digest, "DEFAULT_PART_ROWS", 8)
    monkeypatch.setattr(input_digest, "MAX_DEFAULT_PARTS", 4)
    config = job(write_mixed(tmp_path / "in"), tmp_path / "out", part_rows=None)
    assert check_same(config, tmp_path, 3).part_rows == 32


def test_an_input_without_rows_has_an_index(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in", ("a.jsonl", []))
    assert check_same(job(source, tmp_path / "out"), tmp_path, 3).rows == 0


BAD: list[dict[str, Any]] = [
    *ROWS[:15],
    {"id": True, "prompt": "not an id"},
    {"id": "r3", "prompt": "again"},
    # A bad row has its own id, unless a prompt has it.
    {"id": "r17", "prompt": 5},
    {"id": "r3", "prompt": 5},
    *ROWS[19:40],
    # The id of the error row of line 16, and so a duplicate itself.
    {"id": "line:16", "prompt": "x"},
    # The id of the error row of that duplicate, on line 41.
    {"id": "line:41", "prompt": "x"},
    {"prompt": "without an id: 42"},
    {"id": "42", "prompt": "x"},
    {"id": 7, "prompt": "x"},
    *ROWS[45:80],
    {"id": "r79", "prompt": "again"},
]


@pytest.mark.parametrize("count", [2, 9])
def test_recorded_bad_rows_and_duplicates_are_those_of_one_check(
    tmp_path: Path, count: int
) -> None:
    source = write_input(tmp_path / "in", ("a.jsonl", BAD[:37]), ("b.jsonl", BAD[37:]))
    plan = check_same(job(source, tmp_path / "out", on_bad_row="record"), tmp_path, count)
    assert plan.bad_rows == 8


def test_bad_rows_of_a_shard_leave_no_piece(tmp_path: Path) -> None:
    rows = [*ROWS[:50], {"prompt": 5}, *ROWS[51:]]
    config = job(write_input(tmp_path / "in", ("a.jsonl", rows)) / "a.jsonl", tmp_path / "out")
    with pytest.raises(InputRowsError) as caught:
        plan_job(shard_of(config, 1, 3))
    assert str(caught.value) == (
        "1 of 40 rows is bad (rows 40 to 79 of 120 were checked); nothing was indexed\n"
        f"{tmp_path}/in/a.jsonl:51: prompt must be a string, not a number"
    ), "the line in the file"
    assert not (tmp_path / "out").exists()
    assert not plan_job(shard_of(config, 0, 3)).complete


def test_repeated_ids_of_two_shards_are_named(tmp_path: Path) -> None:
    rows = [*ROWS[:100], {"id": "r3", "prompt": "again"}]
    path = write_input(tmp_path / "in", ("a.jsonl", rows)) / "a.jsonl"
    with pytest.raises(InputRowsError) as whole:
        plan_job(job(path, tmp_path / "whole"))
    config = job(path, tmp_path / "out")
    assert not plan_job(shard_of(config, 1, 2)).complete
    for _ in range(2):
        with pytest.raises(InputRowsError) as caught:
            plan_job(shard_of(config, 0, 2))
        assert str(caught.value) == str(whole.value)
    assert "a.jsonl:101: id 'r3' was already used on line 4" in str(caught.value)


def test_only_parts_with_repeated_hashes_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ROWS[:100], {"id": "r3", "prompt": "again"}]
    source = write_input(tmp_path / "in", ("a.jsonl", rows))
    config = job(source, tmp_path / "out", on_bad_row="record")
    plan_job(shard_of(config, 1, 2))
    plan_job(shard_of(config.model_copy(update={"output": str(tmp_path / "other")}), 0, 2))
    os.rename(
        tmp_path / "other" / ".gptbatch" / "input_index.0-of-2.parquet",
        tmp_path / "out" / ".gptbatch" / "input_index.0-of-2.parquet",
    )
    read: list[int] = []
    all_rows = InputFiles.rows

    def counted(self: InputFiles, *arguments: Any) -> Any:
        for row in all_rows(self, *arguments):
            read.append(row.position)
            yield row

    monkeypatch.setattr(InputFiles, "rows", counted)
    assert plan_job(shard_of(config, 0, 2)).bad_rows == 1
    assert set(read) == {*range(10), 100}


@pytest.mark.parametrize("count", [1, 3])
def test_trusted_ids_are_not_compared(tmp_path: Path, count: int) -> None:
    rows = [*ROWS[:100], {"id": "r3", "prompt": "again"}, {"id": "r3", "prompt": "again"}]
    source = write_input(tmp_path / "in", ("a.jsonl", rows))
    config = job(source, tmp_path / "out", ids="trusted")
    plan = plan_job(config) if count == 1 else check_same(config, tmp_path, count)
    assert (plan.rows, plan.bad_rows, plan.complete) == (102, 0, True)
    with pytest.raises(InputRowsError, match="2 of 102 rows are bad"):
        plan_job(config.model_copy(update={"ids": "checked"}))


def test_errors_are_limited_when_the_pieces_are_joined(tmp_path: Path) -> None:
    rows = [{"prompt": 5}, *ROWS[1:60], {"prompt": 5}, *ROWS[61:]]
    source = write_input(tmp_path / "in", ("a.jsonl", rows))
    config = job(source, tmp_path / "out", on_bad_row="record", max_row_errors="1")
    assert plan_job(shard_of(config, 0, 2)).bad_rows == 1
    with pytest.raises(InputRowsError, match="2 of 120 rows are errors, more than max_row_errors"):
        plan_job(shard_of(config, 1, 2))
    assert not (tmp_path / "out" / ".gptbatch" / INDEX).exists()
    config = config.model_copy(update={"max_row_errors": "2"})
    assert plan_job(shard_of(config, 0, 2)).complete, "the pieces are there"


def test_a_row_to_skip_must_exist_in_some_shard(tmp_path: Path) -> None:
    source = write_mixed(tmp_path / "in")
    config = job(source, tmp_path / "out", skip_row=["r3", "none"])
    plan_job(shard_of(config, 0, 2))
    with pytest.raises(ConfigError, match="no row has the id 'none' that skip_row names"):
        plan_job(shard_of(config, 1, 2))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_shards_of_any_rows_write_the_index_of_one_check(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows with and without ids, with repeated ids, and bad ones, in files of all kinds."""
    work = tmp_path_factory.mktemp("any")
    special = st.sampled_from(["a", "", "line:3", "line:9", "row:8"])
    own = st.none() | st.integers(0, 80).map(str) | special
    ids = data.draw(st.lists(st.tuples(own, st.booleans()), max_size=60))
    rows = [
        {"id": name, "prompt": f"{index}", "top_k": -1 if is_bad else None}
        for index, (name, is_bad) in enumerate(ids)
    ]
    borders = sorted(data.draw(st.lists(st.integers(0, len(rows)), min_size=2, max_size=2)))
    suffixes = data.draw(st.permutations(["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]))
    bounds = pairwise([0, *borders, len(rows)])
    files = [
        (f"{index}.{suffix}", rows[first:end])
        for index, (suffix, (first, end)) in enumerate(zip(suffixes, bounds, strict=False))
        if end > first
    ]
    source = write_input(work / "in", ("none.jsonl", []), *files)
    config = job(
        source,
        work / "out",
        part_rows=data.draw(st.sampled_from([1, 3, 10, 100])),
        limit=data.draw(st.none() | st.integers(0, 70)),
        on_bad_row="record",
    )
    check_same(config, work, data.draw(st.integers(2, 6)))


# -- several processes, and other counts of shards ------------------------------------------------


def test_pieces_of_another_count_are_not_used(tmp_path: Path) -> None:
    config = job(write_mixed(tmp_path / "in"), tmp_path / "out")
    plan_shards(config, 3, [0, 2])
    assert len(pieces_of(tmp_path / "out")) == 2
    check_same(config, tmp_path, 2)


def test_a_check_without_shards_deletes_pieces(tmp_path: Path) -> None:
    config = job(write_mixed(tmp_path / "in"), tmp_path / "out")
    plan_shards(config, 3, [0, 2])
    plan_job(config)
    assert pieces_of(tmp_path / "out") == []


def test_a_shard_that_runs_again_is_not_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(write_mixed(tmp_path / "in"), tmp_path / "out")
    first = plan_job(shard_of(config, 0, 2))

    def fail(*arguments: Any) -> None:
        raise AssertionError("the rows are checked again")

    with monkeypatch.context() as patch:
        patch.setattr(plan_shard, "check_parts", fail)
        assert plan_job(shard_of(config, 0, 2)) == first
    assert plan_job(shard_of(config, 1, 2)).complete
    monkeypatch.setattr(plan_shard, "check_parts", fail)
    assert [plan.complete for plan in plan_shards(config, 5)] == 5 * [True]
    assert plan_job(config).complete


def test_a_changed_input_is_checked_anew(tmp_path: Path) -> None:
    source = write_mixed(tmp_path / "in")
    config = job(source, tmp_path / "out")
    plan_job(shard_of(config, 0, 2))
    write_input(source, ("0.jsonl", ROWS[:24]), ("1.jsonl.gz", ROWS[24:55]))
    assert not plan_job(shard_of(config, 1, 2)).complete, "the piece of shard 0 is outdated"
    check_same(config, tmp_path, 2)


@pytest.mark.parametrize("settings", [{"limit": 90}, {"part_rows": 11}, {"id_field": "note"}])
def test_pieces_of_other_settings_are_not_used(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = write_mixed(tmp_path / "in")
    plan_job(shard_of(job(source, tmp_path / "out"), 0, 2))
    config = job(source, tmp_path / "out", **settings)
    assert not plan_job(shard_of(config, 1, 2)).complete
    check_same(config, tmp_path, 2)


def test_an_input_that_changes_while_it_is_checked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_input(tmp_path / "in", ("a.jsonl", ROWS)) / "a.jsonl"
    config = job(path, tmp_path / "out")
    count = InputFiles.count

    def changed_after(self: InputFiles, limit: int | None = None) -> RowCount:
        counted = count(self, limit)
        path.write_bytes(text_of(ROWS[:100]))
        return counted

    monkeypatch.setattr(InputFiles, "count", changed_after)
    with pytest.raises(InputRowsError, match="has changed while it was checked; run all shards"):
        plan_job(shard_of(config, 1, 2))


@pytest.mark.parametrize(("change", "word"), [(-1, "more"), (1, "fewer")])
def test_a_count_that_is_not_that_of_the_check_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int, word: str
) -> None:
    source = write_mixed(tmp_path / "in")
    count = InputFiles.count

    def wrong(self: InputFiles, limit: int | None = None) -> RowCount:
        counted = count(self, limit)
        counted.rows += change
        return counted

    monkeypatch.setattr(InputFiles, "count", wrong)
    with pytest.raises(InputRowsError, match=f"has {word} than the {120 + change} rows that were"):
        plan_job(shard_of(job(source, tmp_path / "out"), 1, 2))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_piece_is_replaced(tmp_path: Path, damage: str) -> None:
    config = job(write_mixed(tmp_path / "in"), tmp_path / "out")
    plan_job(shard_of(config, 0, 2))
    piece = tmp_path / "out" / ".gptbatch" / "input_index.0-of-2.parquet"
    content = bytearray(piece.read_bytes())
    if damage == "cut":
        piece.write_bytes(content[:-20])
        assert not plan_job(shard_of(config, 1, 2)).complete
    else:
        content[content.index(id_hash("r3").to_bytes(8, "little"))] ^= 0xFF
        piece.write_bytes(content)
        with pytest.raises(StorageError, match=r"is damaged, and was deleted .* run this shard"):
            plan_job(shard_of(config, 1, 2))
    assert plan_job(shard_of(config, 0, 2)).complete


def _plan(config: JobConfig, start: Any, results: Any) -> None:
    start.wait()
    try:
        results.put(plan_job(config).complete)
    except GptbatchError as error:
        results.put(repr(error))


def test_shards_that_run_at_once_write_one_index(tmp_path: Path) -> None:
    """Each shard runs twice."""
    config = job(write_mixed(tmp_path / "in"), tmp_path / "out")
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    children = [
        context.Process(target=_plan, args=(shard_of(config, index % 3, 3), start, results))
        for index in range(6)
    ]
    for child in children:
        child.start()
    start.set()
    found = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert set(found) <= {True, False}
    assert True in found
    plan_job(config.model_copy(update={"output": str(tmp_path / "whole")}))
    assert index_of(tmp_path / "out") == index_of(tmp_path / "whole")


def test_a_killed_shard_leaves_nothing_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(write_mixed(tmp_path / "in"), tmp_path / "out")
    plan_job(shard_of(config, 0, 2))

    def killed(*arguments: Any) -> None:
        os._exit(9)

    monkeypatch.setattr("gptbatch.pipeline.cluster.plan_shard.write_piece", killed)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=plan_job, args=(shard_of(config, 1, 2),))
    child.start()
    child.join()
    assert child.exitcode == 9
    monkeypatch.undo()
    assert plan_job(shard_of(config, 1, 2)).complete
    plan_job(config.model_copy(update={"output": str(tmp_path / "whole")}))
    assert index_of(tmp_path / "out") == index_of(tmp_path / "whole")


# -- what can be divided, and what uses the index --------------------------------------------------


def test_inputs_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    config = job(tmp_path / "pipe", tmp_path / "out", shard="0/2")
    pipe = r"pipe is a pipe, .*; write its rows to a file, or run `gptbatch plan --index` without"
    with pytest.raises(ConfigError, match=pipe):
        plan_job(config)
    with pytest.raises(ConfigError, match="shard: - is a pipe"):
        plan_job(config.model_copy(update={"input": ["-"]}))
    dataset = JobConfig(model="none", dataset=str(tmp_path), output="out", shard="0/2")
    with pytest.raises(ConfigError, match=r"is a dataset, .*; name its files with --input, or run"):
        plan_job(dataset)


def test_a_run_uses_the_joined_index(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_mixed(tmp_path / "in")
    config = job(source, tmp_path / "out", model=str(checkpoint), max_new_tokens=2)
    plan_shards(config, 3)
    time.sleep(0.1)

    def fail(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("the input is checked again")

    monkeypatch.setattr("gptbatch.pipeline.input.prompt_reader.PromptReader.check", fail)
    assert run_job(shard_of(config, 1, 2)).complete


def test_the_command_says_whether_the_plan_is_complete(tmp_path: Path) -> None:
    write_mixed(tmp_path / "in")
    options = ["--model", "none", "--input", "in", "--output", "out", "--part-rows", "50"]
    first = run_gptbatch("plan", "--index", *options, "--shard", "1/2", cwd=tmp_path)
    assert (first.code, first.summary["complete"]) == (0, False), first.stderr
    assert first.summary["input_digest"] is None
    ranks = {"RANK": "0", "WORLD_SIZE": "2"}
    last = run_gptbatch("plan", "--index", *options, "--shard", "auto", cwd=tmp_path, env=ranks)
    assert (last.code, last.summary["complete"]) == (0, True), last.stderr
    assert last.summary["parts"] == 3
