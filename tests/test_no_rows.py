"""Inputs without rows: a complete output with an empty table, for which no model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline import run as run_module
from gptbatch.pipeline.output.status import output_status
from tests.conftest import run_gptbatch

WriteRows = Callable[..., Path]


def job(checkpoint: Path, folder: Path, **settings: Any) -> JobConfig:
    named = {"model": str(checkpoint), "output": str(folder / "out"), "max_new_tokens": 2}
    return JobConfig(**{**named, "input": str(folder / "prompts.jsonl"), **settings})


def refuse(*_: Any, **__: Any) -> None:
    pytest.fail("a model is loaded for no rows")


@pytest.mark.parametrize(
    "settings", [{}, {"limit": 0}, {"shard": "1/2"}, {"engine": {"attention": "padded"}}]
)
def test_no_model_is_loaded_for_no_rows(
    checkpoint: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    write_rows([{"prompt": "The king"}] if "limit" in settings else [])
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "load_model", refuse)
        for _ in range(2):
            summary = run_job(job(checkpoint, tmp_path, **settings))
            assert (summary.rows, summary.complete) == (0, True)
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert pq.read_table(tmp_path / "out" / "part-000000.parquet").num_rows == 0
    assert output_status(tmp_path / "out").state == "complete"


def test_rows_are_added_to_an_output_without_rows(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    write_rows([])
    assert run_job(job(checkpoint, tmp_path)).complete
    write_rows([{"prompt": "The king"}])
    summary = run_job(job(checkpoint, tmp_path))
    assert (summary.rows, summary.rows_kept, summary.complete) == (1, 0, True)


def test_the_command_says_that_there_are_no_rows(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    base = ("generate", "--model", checkpoint, "--output", tmp_path / "out")
    ran = run_gptbatch(*base, "--input", write_rows([]))
    assert ran.code == 0, ran.stderr
    assert "prompts.jsonl: has no rows" in ran.stderr
    assert "0 rows: the output is an empty table, and no model was loaded" in ran.stderr
    path = write_rows([{"prompt": "The king"}])
    ran = run_gptbatch(*base, "--input", path, "--limit", "0", "--dry-run")
    assert "prompts.jsonl: no row is read, since limit is 0" in ran.stderr
    assert "has no rows" not in ran.stderr
