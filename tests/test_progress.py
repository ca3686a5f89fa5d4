"""The progress of a run: the time that is left, the bar, and `gptbatch status --watch`."""

from __future__ import annotations

import io
import json
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gptbatch.jobs import progress
from gptbatch.pipeline.engine.engine import EngineStats
from gptbatch.pipeline.output.progress_file import ProgressFile, read_progress
from gptbatch.pipeline.output.time_left import TimeLeft, seconds_left_by_rows
from gptbatch.pipeline.storage.atomic_write import FileWriter
from gptbatch.pipeline.types import Completion, StopReason, Timing, TokenizedPrompt
from tests.conftest import run_gptbatch, tokenized
from tests.launcher import Launcher
from tests.processes import wait_for

# seconds per prompt token and per new token
PREFILL_S, DECODE_S = 0.001, 0.01


def completed(prompt: TokenizedPrompt, tokens: int, stop_reason: StopReason) -> Completion:
    return Completion(
        prompt=prompt.prompt,
        prompt_tokens=len(prompt.token_ids),
        prompt_tokens_dropped=0,
        token_ids=[1] * tokens,
        finish_reason="length",
        stop_reason=stop_reason,
        error=None,
        timing=Timing(
            queue_s=0, prefill_s=0, decode_s=0, mean_batch_size=1, started_at_s=0, cached_tokens=0
        ),
    )


def seconds_after(
    rows: list[tuple[TokenizedPrompt, int, StopReason]],
    n_done: int,
    n_read: int,
    monkeypatch: pytest.MonkeyPatch,
) -> float | None:
    """Return the time that is left when rows are done, and more are read, one after the other."""
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    left, stats = TimeLeft(len(rows)), EngineStats()
    for prompt, _, _ in rows[:n_read]:
        left.read(prompt, prompt.prompt.params.max_new_tokens)
    for prompt, tokens, reason in rows[:n_done]:
        stats.prefilled_tokens += len(prompt.token_ids)
        stats.prefill_s += PREFILL_S * len(prompt.token_ids)
        stats.decoded_tokens += tokens
        stats.new_tokens += tokens
        stats.decode_s += DECODE_S * tokens
        left.finished(completed(prompt, tokens, reason))
    clock = stats.prefill_s + stats.decode_s
    return left.seconds(stats)


def true_seconds(rows: list[tuple[TokenizedPrompt, int, StopReason]]) -> float:
    return sum(PREFILL_S * len(prompt.token_ids) + DECODE_S * tokens for prompt, tokens, _ in rows)


def test_long_rows_that_are_read_count_for_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    short = [tokenized(i, [1] * 5, max_new_tokens=2) for i in range(20)]
    long = [tokenized(i, [1] * 50, max_new_tokens=200) for i in range(20, 40)]
    rows: list[tuple[TokenizedPrompt, int, StopReason]] = [
        (row, row.prompt.params.max_new_tokens, "max_new_tokens") for row in short + long
    ]
    found = seconds_after(rows, 20, 40, monkeypatch)
    assert found == pytest.approx(true_seconds(rows[20:]))
    elapsed_s = true_seconds(rows[:20])
    assert seconds_left_by_rows(elapsed_s, 20, 20) == pytest.approx(elapsed_s)


def test_rows_that_stop_by_themselves_are_expected_to_go_on_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(0)
    rows: list[tuple[TokenizedPrompt, int, StopReason]] = []
    for i in range(2000):
        stop = int(rng.expovariate(1 / 30)) + 1
        reason: StopReason = "end_of_text" if stop <= 100 else "max_new_tokens"
        rows.append((tokenized(i, [1] * 10, max_new_tokens=100), min(stop, 100), reason))
    found = seconds_after(rows, 400, 500, monkeypatch)
    assert found == pytest.approx(true_seconds(rows[400:]), rel=0.1)


def test_nothing_is_left_at_the_end_and_unknown_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[tuple[TokenizedPrompt, int, StopReason]] = [
        (tokenized(i, [1], max_new_tokens=3), 3, "max_new_tokens") for i in range(4)
    ]
    assert seconds_after(rows, 4, 4, monkeypatch) == 0
    assert seconds_after(rows, 0, 4, monkeypatch) is None
    assert seconds_left_by_rows(1.0, 0, 4) is None


def test_error_rows_that_never_ran_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    left = TimeLeft(3)
    stats = EngineStats(
        prefilled_tokens=1, prefill_s=PREFILL_S, decoded_tokens=4, new_tokens=4, decode_s=DECODE_S
    )
    prompt = tokenized(0, [1], max_new_tokens=4)
    left.read(prompt, 4)
    left.finished(completed(prompt, 4, "max_new_tokens"))
    for index in (1, 2):
        failed = completed(tokenized(index, [1]), 0, "max_new_tokens")
        left.finished(replace(failed, timing=None))
    assert left.seconds(stats) == 0


def test_prompts_of_one_token_on_a_device_need_no_prefill() -> None:
    left = TimeLeft(2)
    left.read(tokenized(0, [1], max_new_tokens=4), 4)
    stats = EngineStats(decoded_tokens=1, new_tokens=1, decode_s=DECODE_S)
    assert left.seconds(stats) is not None


def test_the_bar_shows_time_speed_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "REFRESH_S", 0.0)
    bar = progress.Bar()
    bar.begin(10, 2)
    bar.update(rows=0, errors=0, completion_tokens=0, remaining_s=None)
    bar.update(rows=3, errors=1, completion_tokens=50, remaining_s=75.0)
    bar.end()
    shown = stderr.getvalue()
    assert "| 5/10 rows [00:00, 01:15 left, " in shown
    assert " tokens/s, 1 error]" in shown
    assert " 0 tokens/s" not in shown


# -- status ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing", "missing: no such folder; name the"), ("", "holds no run of gptbatch; name the")],
)
def test_status_says_that_a_new_run_may_be_checking_its_input(
    tmp_path: Path, name: str, said: str
) -> None:
    done = run_gptbatch("status", tmp_path / name)
    assert (done.code, said in done.stderr) == (66, True)
    assert "after the check of its input)" in done.stderr


def test_watching_a_finished_run_prints_it_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_gptbatch("generate", "--config", "demo", "--limit", "3", "--output", out).code == 0
    once = run_gptbatch("status", out)
    watched = run_gptbatch("status", out, "--watch")
    assert (watched.code, watched.stdout) == (0, once.stdout)


def test_the_watch_ends_with_the_run(tmp_path: Path, launcher: Launcher) -> None:
    out = tmp_path / "out"
    run = launcher.start(
        "generate", "--config", "demo", "--output", out, "--part-rows", "8", "--threads", "1"
    )
    wait_for(lambda: list(out.glob(".gptbatch/runs/*/progress.json")), "the progress file")
    watched = run_gptbatch("status", out, "--watch", "--json")
    assert watched.code == 0
    states = [json.loads(line) for line in watched.stdout.splitlines()]
    assert [state["state"] for state in states[:-1]] == ["running"] * (len(states) - 1)
    assert (states[-1]["state"], states[-1]["rows_done"]) == ("complete", 200)
    assert run.wait() == 0


def test_ctrl_c_ends_the_watch(tmp_path: Path, launcher: Launcher) -> None:
    out = tmp_path / "out"
    run = launcher.start(
        "generate", "--config", "demo", "--output", out, "--threads", "1", "--batch-size", "1"
    )
    wait_for(lambda: list(out.glob(".gptbatch/runs/*/progress.json")), "the progress file")
    watch = launcher.start("status", out, "--watch")
    stdout = watch.folder / "stdout"
    wait_for(lambda: stdout.exists() and "rows" in watch.stdout, "the first state")
    watch.send_signal(signal.SIGINT)
    assert watch.wait() == 0
    assert watch.stderr == ""
    run.send_signal(signal.SIGINT)
    assert run.wait() == 75


# -- the speed -------------------------------------------------------------------------------------


def test_the_recorded_speed_is_that_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading the model before the rows, and finishing the output after them, do not count."""
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    file = ProgressFile(
        tmp_path, FileWriter(tmp_path), rows_total=2, rows_kept=0, error_rows_kept=0
    )
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    bar = progress.Bar()
    with file.recording_state():
        clock += 7
        for observer in (file, bar):
            observer.begin(2, 0)
        clock += 4
        for observer in (file, bar):
            observer.update(rows=2, errors=0, completion_tokens=80, remaining_s=0.0)
        bar.end()
        clock += 50
    recorded = read_progress(tmp_path)
    assert recorded is not None
    assert (recorded.state, recorded.tokens_per_s) == ("complete", 20.0)
    assert "20 tokens/s" in shown.getvalue()


def test_summary_and_status_say_one_speed_that_outlives_the_end_of_the_output(
    tmp_path: Path,
) -> None:
    """Runs that only mark the output complete generate no token, and keep the speed."""
    out = tmp_path / "out"
    generate = ("generate", "--config", "demo", "--limit", "3", "--output", out)
    summary = json.loads(run_gptbatch(*generate).stdout)
    assert summary["tokens_per_s"] > 0
    status = json.loads(run_gptbatch("status", out, "--json").stdout)
    assert status["tokens_per_s"] == summary["tokens_per_s"]
    for again in (("finish", out), generate):
        (out / "_SUCCESS").unlink()
        assert run_gptbatch(*again).code == 0
        assert json.loads(run_gptbatch("status", out, "--json").stdout) == status


def test_error_rows_that_never_ran_are_counted_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps({"prompt": "king " * 400}) + "\n") * 2)
    out = tmp_path / "out"
    files = ("--input", tmp_path / "rows.jsonl", "--output", out)
    done = run_gptbatch("generate", "--model", "bundled:demo/model", *files)
    assert json.loads(done.stdout)["errors"] == 2
    (progress,) = [read_progress(run) for run in (out / ".gptbatch" / "runs").iterdir()]
    assert progress is not None
    assert (progress.rows_done, progress.error_rows) == (2, 2)
