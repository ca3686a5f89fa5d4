"""`gptbatch plan`: the work of a run is predicted exactly, and its time from measured steps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptbatch.jobs.cli import run_command
from gptbatch.pipeline import EngineConfig, JobConfig, inspect_job, run_parts
from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.estimate import forecast as forecast_module
from gptbatch.pipeline.estimate import workload as workload_module
from gptbatch.pipeline.estimate.estimate import RunEstimate, estimate_job
from gptbatch.pipeline.estimate.lengths import Observation, fit_lengths
from gptbatch.pipeline.estimate.pilot import run_pilot, spread
from gptbatch.pipeline.estimate.step_cost import WORK, fit_step_cost, r_squared, resampled
from gptbatch.pipeline.estimate.walk import Batching, walk
from gptbatch.pipeline.kv_cache.spec import BackendName
from gptbatch.pipeline.types import TokenizedPrompt
from tests.conftest import our_model, random_model, run_gptbatch, tokenized

WriteRows = Callable[..., Path]


# -- the parts of the prediction ---------------------------------------------------------------


def ragged_prompts(count: int, seed: int = 0) -> list[TokenizedPrompt]:
    rng = random.Random(seed)
    prefix = [rng.randrange(300) for _ in range(20)]
    return [
        tokenized(
            index,
            (prefix if index % 3 else []) + [rng.randrange(300) for _ in range(rng.randint(1, 30))],
            max_new_tokens=rng.randint(1, 20),
        )
        for index in range(count)
    ]


def batching_of(engine: Engine, capacity: int | None) -> Batching:
    spec, backend = engine.model.cache_spec, engine.model.backend
    return Batching(
        batch_size=engine.batch_size,
        max_waiting=engine.max_waiting,
        step_tokens=engine.scheduling.step_tokens,
        n_positions=spec.config.n_positions,
        n_blocks=spec.n_blocks(engine.batch_size, capacity),
        block_size=spec.block_size,
        interleave_prefill=backend.interleaves_prefill,
        share_prefixes=backend.paged,
        slide=engine.window_full == "slide",
    )


@pytest.mark.parametrize("window_full", ["stop", "slide"])
@pytest.mark.parametrize(
    ("attention", "capacity"), [("ragged", None), ("ragged", 256), ("padded", None)]
)
def test_the_walk_does_the_steps_of_the_engine(
    attention: BackendName, capacity: int | None, window_full: Any
) -> None:
    model = our_model(random_model(), attention=attention)
    memory = None if capacity is None else capacity * model.cache_spec.bytes_per_token
    engine = Engine(
        model=model,
        batch_size=6,
        eos_token_ids=(0,),
        memory_bytes=memory,
        window_full=window_full,
    )
    prompts = ragged_prompts(60)
    lengths = {
        row.prompt.index: len(row.token_ids)
        for rows in engine.generate(iter(prompts))
        for row in rows
    }
    in_order = [lengths[prompt.prompt.index] for prompt in prompts]
    done = walk(prompts, in_order, batching_of(engine, capacity))
    assert done.work.tolist() == [getattr(engine.stats, name) for name in WORK]
    assert 0 < done.mean_batch_size <= 6
    assert 0 <= done.drain_steps < done.work[0]


def test_the_lengths_of_whole_rows_are_counted() -> None:
    observed = [Observation(tokens, stopped=True) for tokens in range(1, 21)]
    curve = fit_lengths(observed)
    assert curve.survival[:4].tolist() == pytest.approx([1, 0.95, 0.9, 0.85])
    assert curve.lengths(np.array([0.01, 0.06, 0.26])).tolist() == [1, 2, 6]


def test_rows_that_were_cut_off_do_not_shorten_the_lengths() -> None:
    rng = np.random.default_rng(0)
    whole = rng.geometric(0.02, size=4000)
    limits = rng.integers(5, 80, size=4000)
    observed = [
        Observation(int(min(length, limit)), stopped=bool(length <= limit))
        for length, limit in zip(whole, limits, strict=True)
    ]
    quantiles = (np.arange(1000) + 0.5) / 1000
    drawn = fit_lengths(observed).lengths(quantiles)
    assert drawn.mean() == pytest.approx(50, rel=0.06)
    assert np.minimum(drawn, 40).mean() == pytest.approx(np.minimum(whole, 40).mean(), rel=0.03)


def test_rows_that_never_stop_reach_every_limit() -> None:
    curve = fit_lengths([Observation(7, stopped=False), Observation(0, stopped=False)])
    assert np.isinf(curve.lengths(np.array([0.1, 0.999]))).all()


def synthetic_steps(n: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    decoded = rng.integers(1, 64, size=n)
    prefilled = rng.integers(0, 2, size=n) * rng.integers(1, 400, size=n)
    context = decoded * rng.integers(20, 300, size=n)
    return np.stack([np.ones(n), decoded, context, prefilled], axis=1).astype(np.float64)


def test_the_cost_of_steps_is_found_in_noise() -> None:
    rng = np.random.default_rng(1)
    work, cost = synthetic_steps(300, rng), np.array([5e-3, 4e-4, 1e-6, 2e-4])
    seconds = work @ cost * rng.normal(1, 0.05, size=300)
    found = fit_step_cost(work, seconds, context_s=2e-6)
    assert found.tolist() == pytest.approx(cost.tolist(), rel=0.2)
    assert r_squared(work, seconds, found) > 0.9


def test_equal_contexts_leave_their_cost_at_the_prior() -> None:
    rng = np.random.default_rng(2)
    work = synthetic_steps(30, rng)
    work[:, 2] = work[:, 1] * 40
    seconds = work @ np.array([5e-3, 4e-4, 1e-6, 2e-4]) + rng.normal(0, 1e-3, size=30)
    assert fit_step_cost(work, seconds, context_s=1e-6)[2] == pytest.approx(1e-6, rel=0.1)


def test_resampled_steps_are_blocks_of_neighbours() -> None:
    indices = resampled(100, np.random.default_rng(0))
    assert len(indices) == 100
    assert (indices >= 0).all()
    assert (indices < 100).all()
    assert (np.diff(indices) == 1).sum() >= 80


def test_the_first_rows_of_the_pilot_are_like_all() -> None:
    prompts = [tokenized(index, [1] * (index % 50 + 1)) for index in range(1000)]
    ordered = spread(prompts)
    assert sorted(row.prompt.index for row in ordered) == list(range(1000))
    for count in (20, 64, 200):
        mean = np.mean([len(row.token_ids) for row in ordered[:count]])
        assert mean == pytest.approx(25.5, rel=0.1)


def test_the_pilot_ends_in_time_with_rows_cut_off(checkpoint: Path, write_rows: WriteRows) -> None:
    from gptbatch.pipeline.input.tokenizer import PromptTokenizer
    from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer

    model = our_model(random_model(n_positions=2048))
    prompts = [tokenized(i, [5] * (i % 9 + 1), max_new_tokens=2000) for i in range(40)]
    tokenizer = PromptTokenizer(load_tokenizer(checkpoint), start_token=0)
    pilot = run_pilot(
        lambda size: Engine(model=model, batch_size=size, eos_token_ids=()),
        prompts,
        batch_size=8,
        seconds=0.5,
        tokenizer=tokenizer,
    )
    assert len(pilot.observed) == 8
    assert not any(row.stopped for row in pilot.observed)
    assert 0 < pilot.seconds.sum() < 1.5
    assert [len(segment) > 0 for segment in pilot.segments] == [True, True]
    small = pilot.work[pilot.segments[1].start :]
    assert small[:, 1].max() <= 2


# -- the whole ---------------------------------------------------------------------------------


def job(checkpoint: Path, source: Path, output: Path, **settings: Any) -> JobConfig:
    return JobConfig(
        model=str(checkpoint),
        input=str(source),
        output=str(output),
        max_new_tokens=8,
        engine=EngineConfig(threads=1),
        **settings,
    )


def plan_of(config: JobConfig, **more: Any) -> RunEstimate:
    return estimate_job(config, seconds=1.0, **more)


ROWS = [{"prompt": f"The king {'and the queen ' * (i % 4)}", "n": 1 + i % 2} for i in range(40)]


def test_rows_and_tokens_are_those_of_the_dry_run(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    source = write_rows([*ROWS, {"prompt": "king " * 80}])
    config = job(checkpoint, source, tmp_path / "out", ignore_eos=True, part_rows=10)
    lines: list[str] = []
    found = plan_of(config, price_per_hour=3.6, report=lines.append)
    counted = inspect_job(config)
    assert found.rows == found.rows_total == counted.rows == 41
    assert found.error_kinds == counted.error_kinds == {"too_long": 1}
    assert found.samples == 60
    assert found.new_tokens == found.new_tokens_limit == 60 * 8
    assert found.parts == 5
    assert found.time is not None
    assert 0 < found.time.start_s < found.time.expected_s
    assert found.time.low_s <= found.time.expected_s <= found.time.high_s
    assert found.price is not None
    assert found.price["expected_s"] == pytest.approx(found.time.expected_s / 1000, abs=1e-4)
    assert found.memory is not None
    assert found.memory.expected_bytes <= found.memory.limit_bytes
    assert any("too_long" in warning for warning in found.warnings)
    assert any("whole vocabulary" in warning for warning in found.warnings)
    assert not (tmp_path / "out").exists()
    assert len(lines) == 3


def test_what_is_left_is_planned(checkpoint: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    source = write_rows(ROWS)
    config = job(checkpoint, source, tmp_path / "out", part_rows=10)
    run_parts(config, [1, 3])
    found = plan_of(config)
    assert (found.rows_total, found.rows, found.parts) == (40, 20, 2)
    shard = config.model_copy(update={"shard": "0/4"})
    assert plan_of(shard).rows == 10
    last = plan_of(config.model_copy(update={"shard": "3/4"}))
    assert (last.rows_total, last.rows, last.time) == (10, 0, None)


def test_rejected_rows_are_not_sampled(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad rows where the stretches of a sample would be."""
    monkeypatch.setattr(workload_module, "SAMPLED_ROWS", 20)
    monkeypatch.setattr(workload_module, "ROWS_PER_STRETCH", 5)
    rows = [{"prompt": 5 if i % 10 < 5 else "The king"} for i in range(40)]
    more = {"on_bad_row": "record", "max_row_errors": "100%", "ignore_eos": True}
    found = plan_of(job(checkpoint, write_rows(rows), tmp_path / "out", **more))
    assert found.error_kinds == {"bad_row": 20}
    assert found.samples == 20
    assert found.time is not None


@pytest.mark.parametrize("attention", ["padded", "ragged"])
def test_packed_weights_are_counted(attention: BackendName) -> None:
    theirs = random_model()
    plain = our_model(theirs, packed=False, attention=attention).weights_bytes()
    packed = our_model(theirs, attention=attention)
    head = packed.lm_head.packed_bytes
    assert head >= 300 * 32 * 4
    # The plain embedding and the packed head are two copies of one weight. Packing rounds sizes up.
    assert plain <= packed.weights_bytes() - head < 1.3 * plain


def test_a_large_input_is_walked_in_part(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(ROWS * 3, "large.jsonl")
    config = job(checkpoint, source, tmp_path / "out", ignore_eos=True)
    whole = plan_of(config)
    monkeypatch.setattr(forecast_module, "MAX_WALKED_TOKENS", 480)
    part = plan_of(config)
    assert part.new_tokens == whole.new_tokens == 180 * 8


def test_the_command_prints_lines_or_json(
    checkpoint: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    options = ["--model", str(checkpoint), "--input", str(write_rows(ROWS)), "--output", "out"]
    options += ["--max-new-tokens", "8", "--threads", "1"]
    ran = run_gptbatch("plan", *options, "--seconds", "1", "--price-per-hour", "2", cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    starts = [line.split()[0] for line in ran.stdout.splitlines()]
    assert starts[1:9] == ["rows", "tokens", "time", "price", "memory", "disk", "a", "pilot"]
    options += ["--part-rows", "5", "--batch-size", "3"]
    ran = run_gptbatch("plan", *options, "--seconds", "1", "--json", cwd=tmp_path)
    found = json.loads(ran.stdout)
    assert found["rows"] == 40
    # 3 samples run and 9 wait, of 60 in 40 rows.
    assert found["kill_rows"] == 5 + 8
    assert 0 < found["kill_s"] < found["time"]["expected_s"]
    assert found["pilot"]["steps"] >= 10
    assert found["pilot"]["r_squared"] <= 1
    assert run_gptbatch("generate", *options, cwd=tmp_path).code == 0
    ran = run_gptbatch("plan", *options, cwd=tmp_path)
    assert "nothing is left to do" in ran.stdout


def test_the_command_speaks_of_one_row(
    checkpoint: Path, write_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(checkpoint), "--max-new-tokens", "8", "--threads", "1"]
    options += ["--seconds", "1", "--part-rows", "1"]
    path = str(write_rows([{"prompt": "a"}]))
    assert run_command(["plan", *options, "--input", path]) == 0
    shown = capsys.readouterr().out
    for said in (
        " with up to 1 row at once",
        "in 1 part of at most 1 row\n",
        "a kill   costs up to about 1 row of unfinished parts, ",
        "pilot    1 row in ",
        " stopped by themselves; 6 steps\n",
    ):
        assert said in shown
    # a few steps are explained by the four costs of any fit
    assert run_command(["plan", *options, "--input", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pilot"]["steps"], found["pilot"]["r_squared"]) == (6, None)
    assert not any("R2" in warning for warning in found["warnings"])
    path = str(write_rows([{"prompt": 5}]))
    assert run_command(["plan", *options, "--input", path]) == 65
    assert "1 of 1 row is bad; nothing was predicted\n" in capsys.readouterr().err


def test_a_plan_needs_no_output(checkpoint: Path, write_rows: WriteRows, tmp_path: Path) -> None:
    """Also inside the folder of its own input, where none could be written."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(ROWS).rename(folder / "prompts.jsonl")
    options = ["--model", str(checkpoint), "--dataset", str(folder), "--max-new-tokens", "8"]
    options += ["--threads", "1", "--seconds", "1"]
    before = sorted(folder.rglob("*"))
    ran = run_gptbatch("plan", *options, cwd=folder)
    assert ran.code == 0, ran.stderr
    assert ran.stdout.startswith("a prediction; nothing is written\nrows     40\n")
    ran = run_gptbatch("plan", *options, "--json", cwd=folder)
    assert (json.loads(ran.stdout)["output"], json.loads(ran.stdout)["rows"]) == (None, 40)
    assert sorted(folder.rglob("*")) == before
    ran = run_gptbatch("plan", *options[:-2], "--index", cwd=folder)
    assert (ran.code, "output is required" in ran.stderr) == (2, True)


def test_the_index_has_no_pilot(tmp_path: Path) -> None:
    ran = run_gptbatch(
        "plan", "--index", "--seconds", "3", "--config", "demo", "--output", "out", cwd=tmp_path
    )
    assert ran.code == 2
    assert "--seconds and --index cannot be given together" in ran.stderr


def test_status_after_the_index(tmp_path: Path) -> None:
    options = ["--config", "demo", "--output", "out", "--part-rows", "20"]
    assert run_gptbatch("plan", "--index", *options, cwd=tmp_path).code == 0
    ran = run_gptbatch("status", "out", cwd=tmp_path)
    assert ran.code == 0
    assert ran.stdout.startswith(
        "out: indexed\nrows     0 of 200, 200 left\nparts    0 of 10, 10 left\n"
    )
