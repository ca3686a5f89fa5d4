"""Runs that pull their parts in another order, and give back what they do not write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptbatch.pipeline import ConfigError, JobConfig, finish_folder, run_job, run_parts
from gptbatch.pipeline import run as run_module
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.errors import InputRowsError, StoppedError
from gptbatch.pipeline.input import tokenize
from gptbatch.pipeline.output import run_output
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_source import ListedParts, LocalParts
from gptbatch.pipeline.output.schema import DETERMINISTIC_COLUMNS

WriteRows = Callable[..., Path]
ROWS = [{"id": f"r{i}", "prompt": f"To be, {i}"} for i in range(10)]


class Shuffled:
    """Deals the missing parts in a given order, and records what becomes of them."""

    def __init__(self, numbers: Iterable[int], order: list[int]) -> None:
        missing = set(numbers)
        self.left = [number for number in order if number in missing]
        self.pulled: list[int] = []
        self.written: list[int] = []
        self.back: list[int] = []

    def next(self) -> int | None:
        if not self.left:
            return None
        self.pulled.append(self.left.pop(0))
        return self.pulled[-1]

    def committed(self, part: Part) -> None:
        self.written.append(part.number)

    def given_up(self, number: int) -> None:
        self.back.append(number)


class StopAfter:
    """Asks for a stop at the given step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def requested(self) -> str | None:
        self.steps -= 1
        return "a test" if self.steps < 0 else None


def job(checkpoint: Path, file: Path, output: Path) -> JobConfig:
    return JobConfig(
        model=str(checkpoint),
        input=str(file),
        output=str(output),
        part_rows=2,
        max_new_tokens=4,
        engine=EngineConfig(batch_size=3, device="cpu", threads=1),
    )


def table(output: Path) -> list[dict[str, Any]]:
    parts = [pq.read_table(path) for path in sorted(output.glob("part-*.parquet"))]
    rows: list[dict[str, Any]] = pa.concat_tables(parts).select(DETERMINISTIC_COLUMNS).to_pylist()
    return rows


def use(monkeypatch: pytest.MonkeyPatch, order: list[int]) -> list[Shuffled]:
    made: list[Shuffled] = []

    def source(numbers: Iterable[int]) -> Shuffled:
        made.append(Shuffled(numbers, order))
        return made[-1]

    monkeypatch.setattr(run_output, "LocalParts", source)
    return made


def test_parts_in_any_order_give_the_same_rows(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(ROWS)
    run_job(job(checkpoint, file, tmp_path / "in order"))
    made = use(monkeypatch, [3, 0, 4, 1, 2])
    run_job(job(checkpoint, file, tmp_path / "shuffled"))
    assert made[0].pulled == [3, 0, 4, 1, 2]
    assert sorted(made[0].written) == [0, 1, 2, 3, 4]
    assert made[0].back == []
    assert table(tmp_path / "shuffled") == table(tmp_path / "in order")


def test_a_stopped_run_gives_back_what_it_pulled(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = write_rows(ROWS), tmp_path / "out"
    monkeypatch.setattr(tokenize, "TOKENIZE_ROWS", 1)
    made = use(monkeypatch, [4, 3, 2, 1, 0])
    with pytest.raises(StoppedError):
        run_job(job(checkpoint, file, output), stop=StopAfter(5))
    source = made[0]
    assert source.back
    assert source.written
    assert sorted(source.written + source.back) == sorted(source.pulled)
    run_job(job(checkpoint, file, output))
    assert not set(made[1].pulled) & set(source.written)
    run_job(job(checkpoint, file, tmp_path / "whole"))
    assert table(output) == table(tmp_path / "whole")


def test_a_changed_part_is_found_in_any_order(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(ROWS)
    real = run_module._load

    def load_and_change(*arguments: Any) -> Any:
        text = file.read_text()
        file.write_text(text.replace("To be, 3", "To be, x"))
        return real(*arguments)

    monkeypatch.setattr(run_module, "_load", load_and_change)
    use(monkeypatch, [4, 1, 0])
    with pytest.raises(InputRowsError, match="in rows 2 to 3"):
        run_job(job(checkpoint, file, tmp_path / "out"))


def test_a_shortened_input_is_found_before_another_part_runs(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(ROWS)
    real = run_module._load

    def load_and_shorten(*arguments: Any) -> Any:
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:7]))
        return real(*arguments)

    monkeypatch.setattr(run_module, "_load", load_and_shorten)
    made = use(monkeypatch, [3, 0, 1])
    with pytest.raises(InputRowsError, match="has 7 rows, not the 10 that were checked"):
        run_job(job(checkpoint, file, tmp_path / "out"))
    assert made[0].pulled == [3]


def test_parts_of_two_crashes_run_last(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = write_rows(ROWS), tmp_path / "out"
    with pytest.raises(StoppedError):
        run_job(job(checkpoint, file, output), stop=StopAfter(5))
    journal: dict[str, Any] = {
        "parts_in_flight": [],
        "prompt_id": None,
        "crashes_per_part": {"3": 2},
    }
    (folder,) = (output / ".gptbatch" / "runs").iterdir()
    (folder / "crash_journal.json").write_text(json.dumps(journal))
    made = use(monkeypatch, [3, 4, 2, 1, 0])
    run_job(job(checkpoint, file, output))
    assert made[0].pulled[0] == 3
    assert made[0].written[-1] == 3
    run_job(job(checkpoint, file, tmp_path / "whole"))
    assert table(output) == table(tmp_path / "whole")


def test_local_parts_end() -> None:
    source = LocalParts([2, 5])
    assert [source.next(), source.next(), source.next()] == [2, 5, None]


def test_listed_parts_leave_out_what_is_written_by_then(tmp_path: Path) -> None:
    source = ListedParts([2, 5, 7], tmp_path)
    (tmp_path / "part-000002.parquet").touch()
    assert source.next() == 5
    (tmp_path / "part-000007.parquet").touch()
    assert source.next() is None


def test_runs_of_listed_parts_make_one_output(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    file, output = write_rows(ROWS), tmp_path / "out"
    assert run_parts(job(checkpoint, file, output), [0, 3]).rows == 4
    assert run_parts(job(checkpoint, file, output), iter(range(4))).rows == 4
    assert run_parts(job(checkpoint, file, output), range(5)).rows == 2
    assert finish_folder(output).rows == 10
    with pytest.raises(ConfigError, match="no part 5; the job has parts 0 to 4"):
        run_parts(job(checkpoint, file, tmp_path / "other"), [4, 5])
    run_job(job(checkpoint, file, tmp_path / "whole"))
    assert table(output) == table(tmp_path / "whole")
