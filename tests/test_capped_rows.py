"""Rows whose max_new_tokens is more than the context leaves: counted, and named in one warning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gptbatch.pipeline import JobConfig, inspect_job, run_job

# Of the 64 positions, the prompts take 1, about 60, and too many.
ROWS: list[dict[str, Any]] = [
    {"prompt": "king", "max_new_tokens": 3},
    {"prompt": "king " * 29, "max_new_tokens": 60, "n": 2},
    {"prompt": "king", "max_new_tokens": 1000},
    {"prompt": "king " * 300},
]


@pytest.mark.parametrize(
    ("settings", "capped"),
    [
        ({}, 2),
        ({"context_overflow": "truncate_left", "max_new_tokens": 64}, 2),
        ({"window_full": "slide"}, 0),
    ],
)
def test_dry_run_and_run_count_the_same_rows(
    checkpoint: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    capped: int,
) -> None:
    base = {"model": str(checkpoint), "input": str(write_rows(ROWS)), "ignore_eos": True}
    config = JobConfig(**{**base, "output": str(tmp_path / "out"), "max_new_tokens": 5, **settings})
    said = "max_new_tokens is more than the context leaves after the prompt"
    for act in (inspect_job, run_job):
        caplog.clear()
        assert act(config).rows_capped == capped
        assert caplog.text.count(said) == bool(capped)
    table = pq.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()
    reasons = {(row["finish_reason"], row["stop_reason"]) for row in table if not row["error"]}
    assert (("length", "window") in reasons) == bool(capped)
    assert {row["prompt_index"] for row in table if row["stop_reason"] == "window"} == (
        {1, 2} if capped else set()
    )
    assert run_job(config).rows_capped == 0, "nothing is left to do"
