"""Outputs of earlier versions are read, verified and compared, but not continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.json
import pyarrow.parquet as pq
import pytest

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.errors import OutputConflictError
from gptbatch.pipeline.output.resume import check_same_environment
from gptbatch.pipeline.output.schema import FORMAT, SCHEMA
from tests.old_outputs import MODEL, OUTPUTS, PROMPTS

FORMATS = sorted(path.name for path in OUTPUTS.glob("gptbatch-*"))


def test_an_output_of_this_format_is_kept() -> None:
    """A change of the schema changes the format.

    `python -m tests.old_outputs FOLDER` adds an output of the new format.
    """
    assert FORMAT in FORMATS


@pytest.fixture(params=FORMATS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(OUTPUTS / request.param, tmp_path / request.param))


def test_an_old_output_is_read(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(RunReader(output).rows())
    assert [row["prompt_id"] for row in rows] == ["greedy", "sampled", "too long", "3", "4"]
    assert list(rows[0]) == SCHEMA.names
    assert run_command(["status", str(output), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["state"], status["rows_done"], status["errors"], status["problems"]) == (
        "complete",
        5,
        {"too_long": 1},
        [],
    )


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_an_old_output_is_exported(output: Path, tmp_path: Path, name: str) -> None:
    assert run_command(["export", str(output), "--to", str(tmp_path / name)]) == 0
    read = pq.read_table if name.endswith("parquet") else pyarrow.json.read_json
    table = read(tmp_path / name)
    assert table["prompt_id"].to_pylist() == ["greedy", "sampled", "too long", "3", "4"]
    assert table.schema.names == SCHEMA.names


def test_an_old_output_is_verified_replayed_and_compared(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["verify", str(output), "--all", "--model", str(MODEL)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["complete"], summary["rows_checked"], summary["mismatches"]) == (True, 4, 0)
    assert (
        run_command(["replay", str(output), "--prompt-id", "sampled", "--model", str(MODEL)]) == 0
    )
    assert "equal to the recorded row" in capsys.readouterr().out
    newest = OUTPUTS / FORMAT
    assert run_command(["diff", str(output), str(newest)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["equal"] == 5


def test_an_old_output_is_not_continued(output: Path) -> None:
    if output.name == FORMAT:
        pytest.skip("it is of this version")
    (output / "_SUCCESS").unlink()
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(
        OutputConflictError,
        match=f"holds a run of format {output.name}, and this version writes {FORMAT}",
    ):
        run_job(
            JobConfig(
                model=str(MODEL),
                input=str(PROMPTS),
                output=str(output),
                part_rows=3,
                max_new_tokens=6,
            )
        )
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_run_that_was_not_portable_says_why_it_is_not_continued() -> None:
    """Development builds of this format marked float32 runs as verified."""
    recorded = RunReader(OUTPUTS / FORMAT).facts
    assert recorded["batch_invariance"] == "verified"
    config = JobConfig(model=str(MODEL), input=str(PROMPTS), output="out")
    now = {**recorded["environment"], "arithmetic": 1}
    with pytest.raises(
        OutputConflictError, match="they are not portable, as those of an earlier version"
    ):
        check_same_environment(config, recorded, now, "portable")
    check_same_environment(config, recorded, recorded["environment"], "verified")
