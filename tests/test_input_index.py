"""Inputs of many files, reading from a place, and the index that spares reading again."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbatch.pipeline import ConfigError, InputNotFoundError, JobConfig, plan_job, run_job
from gptbatch.pipeline.errors import InputRowsError
from gptbatch.pipeline.input import input_digest
from gptbatch.pipeline.input.input_digest import default_part_rows
from gptbatch.pipeline.input.input_files import InputFiles
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader
from gptbatch.pipeline.input.rows import RowDefaults
from gptbatch.pipeline.input.source import RawRow
from gptbatch.pipeline.output.index_file import read_index, write_index
from gptbatch.pipeline.output.part_plan import check_part_count
from gptbatch.pipeline.params.sampling_params import SamplingParams
from gptbatch.pipeline.types import Prompt
from tests.conftest import run_gptbatch

Write = Callable[[Path, list[dict[str, Any]]], None]
ROWS = [{"id": f"r{i}", "prompt": f"{i} The king", "note": i} for i in range(120)]
DEFAULTS = RowDefaults(
    prompt_field="prompt",
    sampling=SamplingParams(seed=0, temperature=1.0, top_k=0, max_new_tokens=2),
)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_with_bom_and_blanks(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\r\n" for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n \n")


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"), row_group_size=7)


WRITERS: list[Write] = [write_jsonl, write_with_bom_and_blanks, write_gzip, write_parquet]


def write_files(folder: Path, writers: list[Write], borders: list[int]) -> Path:
    """Write ROWS to a file per writer; a file begins at each border."""
    folder.mkdir()
    bounds = [0, *sorted(borders), len(ROWS)]
    for number, (writer, (first, end)) in enumerate(zip(writers, pairwise(bounds), strict=True)):
        if end > first:
            writer(folder / f"{number:02d}.jsonl", ROWS[first:end])
    return folder


def reader(*names: Path | str, **settings: Any) -> PromptReader:
    return PromptReader(
        source=InputFiles([str(name) for name in names]), defaults=DEFAULTS, **settings
    )


def ids(source: PromptReader, checked: InputSummary, parts: list[int]) -> list[str]:
    return [row.prompt_id for row in source.prompts(checked, parts)]


def expected_ids(checked: InputSummary, parts: list[int]) -> list[str]:
    size = checked.part_rows
    return [f"r{i}" for k in parts for i in range(k * size, min((k + 1) * size, len(ROWS)))]


# -- many files ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rows_and_digests_do_not_depend_on_files(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Parts in any order are read from their places, across borders of files of all kinds."""
    work = tmp_path_factory.mktemp("files")
    write_jsonl(work / "all.jsonl", ROWS)
    writers = data.draw(st.lists(st.sampled_from(WRITERS), min_size=1, max_size=5))
    borders = data.draw(
        st.lists(st.integers(0, len(ROWS)), min_size=len(writers) - 1, max_size=len(writers) - 1)
    )
    part_rows = data.draw(st.sampled_from([1, 7, 30, 50, 120, 200]))
    one = reader(work / "all.jsonl").check(part_rows=part_rows)
    source = reader(write_files(work / "split", writers, borders))
    checked = source.check(part_rows=part_rows)
    assert (checked.digest, checked.part_digests) == (one.digest, one.part_digests)
    n_parts = len(checked.part_digests)
    parts = data.draw(st.lists(st.integers(0, n_parts - 1), max_size=6))
    assert ids(source, checked, parts) == expected_ids(checked, parts)


def test_a_part_is_read_from_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "all.jsonl", ROWS)
    source = reader(tmp_path / "all.jsonl")
    checked = source.check(part_rows=10)
    read: list[int] = []
    rows = InputFiles.rows

    def counted(self: InputFiles, *arguments: Any) -> Iterator[RawRow]:
        for row in rows(self, *arguments):
            read.append(row.position)
            yield row

    monkeypatch.setattr(InputFiles, "rows", counted)
    assert len(ids(source, checked, [7, 8, 2])) == 30
    assert read == [*range(70, 90), *range(20, 30)]


def test_rows_without_ids_are_numbered_over_all_files(tmp_path: Path) -> None:
    for name, texts in (("a.jsonl", ["x", "y"]), ("b.jsonl", ["z"])):
        write_jsonl(tmp_path / name, [{"prompt": text} for text in texts])
    source = reader(tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    rows = [row for row in source.prompts(source.check()) if isinstance(row, Prompt)]
    assert [(row.prompt_id, row.text) for row in rows] == [("0", "z"), ("1", "x"), ("2", "y")]


def test_problems_of_many_files_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "id": "same"}\n{"prompt": 5}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\nnonsense\n{"prompt": "y", "id": "same"}\n')
    with pytest.raises(InputRowsError) as caught:
        reader(tmp_path).check()
    message = str(caught.value)
    assert "3 of 5 rows are bad" in message
    assert f"{tmp_path / 'a.jsonl'}:2: " in message
    assert f"{tmp_path / 'b.jsonl'}:2: " in message
    assert f"{tmp_path / 'b.jsonl'}:3: id 'same' was already used on line 1" in message
    source = reader(tmp_path, record_bad=True)
    checked = source.check()
    found = [row.prompt_id for row in source.prompts(checked)]
    assert len(set(found)) == 5, "error rows have different ids"


def test_folders_and_patterns_stand_for_their_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path / "split", WRITERS, [10, 40, 90])
    (tmp_path / "split" / "notes.txt").write_text("mine")
    (tmp_path / "split" / "README.md").write_text("mine")
    folder = reader(tmp_path / "split")
    assert "4 files are read, and 2 are not" in caplog.text
    assert folder.check().rows == 120
    assert folder.check().digest == reader(f"{tmp_path}/split/0*.*[lqz]*").check().digest
    (tmp_path / "[a].jsonl").write_text('{"prompt": "x"}\n')
    assert reader(tmp_path / "[a].jsonl").check().rows == 1, "a name before a pattern"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["*.none"], r"\*\.none: no file matches this pattern"),
        (["empty"], r"empty: is a folder without files of JSON lines or Parquet"),
        (["gone.jsonl"], r"gone\.jsonl: no such file"),
        (["a.jsonl", "./a.jsonl"], r"a\.jsonl: is given twice"),
        (["a.jsonl", "-"], "standard input cannot be combined"),
    ],
)
def test_names_without_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    with pytest.raises(InputNotFoundError, match=message):
        InputFiles(names)


# -- rows per part ---------------------------------------------------------------------------------


def test_large_inputs_have_larger_parts() -> None:
    counts = {0: 512, 5_120_000: 512, 5_120_001: 1024, 10**8: 16_384, 10**12: 16_384}
    assert {rows: default_part_rows(rows) for rows in counts} == counts
    with pytest.raises(ConfigError, match=r"2000000 files, .* use --part-rows 2 or more"):
        check_part_count(1, 2_000_000)


def test_the_rule_gives_the_digests_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are counted while they are read: parts are joined from blocks at the end."""
    monkeypatch.setattr(input_digest, "BLOCK_ROWS", 8)
    monkeypatch.setattr(input_digest, "DEFAULT_PART_ROWS", 8)
    monkeypatch.setattr(input_digest, "MAX_DEFAULT_PARTS", 4)
    write_jsonl(tmp_path / "all.jsonl", ROWS)
    source = reader(tmp_path / "all.jsonl")
    by_rule = source.check()
    assert by_rule.part_rows == 32
    assert by_rule == source.check(part_rows=32)
    assert ids(source, by_rule, [3, 1]) == expected_ids(by_rule, [3, 1])


# -- the index -------------------------------------------------------------------------------------


def job(checkpoint: Path, output: Path, *inputs: Path, **more: Any) -> JobConfig:
    return JobConfig(
        model=str(checkpoint),
        input=[str(path) for path in inputs],
        output=str(output),
        max_new_tokens=2,
        **{"part_rows": 10, **more},
    )


def age(path: Path) -> None:
    """Make a file old enough that a change would show in its times."""
    os.utime(path, (1.6e9, 1.6e9))
    time.sleep(0.1)


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after whose call no input is checked any more."""

    def forbid() -> None:
        def fail(*arguments: Any, **settings: Any) -> None:
            raise AssertionError("the input is checked again")

        monkeypatch.setattr(PromptReader, "check", fail)

    return forbid


def test_an_index_is_read_back(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "all.jsonl", ROWS)
    write_jsonl(tmp_path / "none.jsonl", [])
    for name in ("all.jsonl", "none.jsonl"):
        checked = reader(tmp_path / name).check(part_rows=10)
        with (tmp_path / "index").open("wb") as file:
            write_index(file, checked)
        found = read_index(tmp_path / "index")
        assert found is not None
        source = reader(tmp_path / name)
        assert list(source.prompts(found)) == list(source.prompts(checked))
    content = (tmp_path / "index").read_bytes()
    (tmp_path / "index").write_bytes(content[:-9])
    assert read_index(tmp_path / "index") is None
    pq.write_table(pa.table({"digest": ["x"]}), tmp_path / "index")
    assert read_index(tmp_path / "index") is None
    assert read_index(tmp_path / "gone") is None


def test_a_plan_spares_runs_the_check(
    checkpoint: Path, tmp_path: Path, no_checks: Callable[[], None]
) -> None:
    write_files(tmp_path / "split", [write_jsonl, write_parquet], [45])
    files = sorted((tmp_path / "split").iterdir())
    config = job(checkpoint, tmp_path / "out", tmp_path / "split")
    run_job(job(checkpoint, tmp_path / "whole", *files))
    plan = plan_job(config)
    assert (plan.rows, plan.parts, plan.part_rows) == (120, 12, 10)
    no_checks()
    run_job(config.model_copy(update={"shard": "1/3"}))
    one, two = (
        [part["content_digest"] for part in json.loads(path.read_text())["parts"]]
        for path in (tmp_path / "whole" / "_manifest.json", tmp_path / "out" / "_manifest.json")
    )
    assert one == two


def test_a_plan_of_changed_files_is_not_used(checkpoint: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:20])
    age(tmp_path / "a.jsonl")
    config = job(checkpoint, tmp_path / "out", tmp_path / "a.jsonl")
    first = plan_job(config)
    write_jsonl(tmp_path / "a.jsonl", ROWS[:30])
    second = plan_job(config)
    assert (first.rows, second.rows) == (20, 30)
    assert run_job(config).rows == 30


def test_a_file_that_changes_unseen_is_found_when_its_part_is_read(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Its size and time of change are as before."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ROWS[:40])
    age(path)
    config = job(checkpoint, tmp_path / "out", path)
    plan_job(config)
    path.write_text(path.read_text().replace("31 The king", "31 The xing"))
    age(path)
    with pytest.raises(InputRowsError, match="in rows 30 to 39; the input has changed"):
        run_job(config.model_copy(update={"shard": "1/2"}))


def test_bad_rows_leave_no_plan(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    config = job(checkpoint, tmp_path / "out", tmp_path / "a.jsonl")
    with pytest.raises(InputRowsError, match="1 of 1 row is bad"):
        plan_job(config)
    assert not (tmp_path / "out").exists()
    assert plan_job(config.model_copy(update={"on_bad_row": "record"})).bad_rows == 1


def test_the_command_prints_the_plan(checkpoint: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:20])
    write_jsonl(tmp_path / "b.jsonl", ROWS[20:])
    options = ["--model", str(checkpoint), "--input", "a.jsonl", "--input", "b.jsonl"]
    ran = run_gptbatch(
        "plan", "--index", *options, "--output", "out", "--part-rows", "50", cwd=tmp_path
    )
    assert ran.code == 0, ran.stderr
    digest = ran.summary.pop("input_digest")
    assert len(digest) == 64
    shown = {key: ran.summary[key] for key in ("output", "rows", "bad_rows", "part_rows", "parts")}
    assert list(shown.values()) == ["out", 120, 0, 50, 3]


def test_an_input_that_has_grown_at_its_end_is_continued(checkpoint: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:25])
    write_jsonl(tmp_path / "b.jsonl", ROWS[25:47])
    config = job(checkpoint, tmp_path / "out", tmp_path / "a.jsonl")
    run_job(config)
    both = job(checkpoint, tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    done = run_job(both)
    assert (done.rows_kept, done.rows, done.complete) == (20, 27, True)
    run_job(job(checkpoint, tmp_path / "whole", tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    one, two = (
        json.loads((tmp_path / name / "_manifest.json").read_text())["identity"]
        for name in ("out", "whole")
    )
    assert one == two


@pytest.mark.parametrize("rows", [0, 5, 25, 40])
def test_the_digest_of_the_first_rows_follows_from_an_index(tmp_path: Path, rows: int) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    source = reader(tmp_path / "a.jsonl")
    checked = source.check(part_rows=10, prefix_rows=[rows])
    assert source.prefix_digest(checked, rows) == checked.prefix_digests[rows]


@pytest.mark.parametrize("rows", [20, 25])
def test_a_plan_of_a_grown_input_spares_runs_the_check(
    checkpoint: Path, tmp_path: Path, no_checks: Callable[[], None], rows: int
) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ROWS[:rows])
    config = job(checkpoint, tmp_path / "out", path)
    run_job(config)
    write_jsonl(path, ROWS[:47])
    age(path)
    assert plan_job(config).rows == 47
    no_checks()
    done = run_job(config)
    assert (done.rows_kept, done.rows, done.complete) == (20, 27, True)


def test_a_plan_of_other_first_rows_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ROWS[:25])
    config = job(checkpoint, tmp_path / "out", path)
    run_job(config)
    write_jsonl(path, [*ROWS[:22], *ROWS[60:100]])
    age(path)
    plan_job(config)
    with pytest.raises(ConfigError, match=r"its 25 rows, of .*a\.jsonl, are not the first 25 rows"):
        run_job(config)
