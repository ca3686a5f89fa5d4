"""`gptbatch bench`: workloads, consistent numbers, charts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptbatch.pipeline.bench.workloads import WORKLOADS, make_workload, renumbered
from gptbatch.pipeline.system.bundled import locate
from tests.conftest import run_gptbatch

DEMO = str(locate("bundled:demo/model"))


def test_workloads_are_what_they_say() -> None:
    uniform, ragged, shared = (
        make_workload(name, vocab_size=50257, n_positions=1024) for name in WORKLOADS
    )
    assert {(len(row.token_ids), row.new_tokens) for row in uniform.rows} == {(32, 128)}
    assert (len(uniform.rows), len(ragged.rows), len(shared.rows)) == (64, 256, 128)
    assert all(4 <= len(row.token_ids) <= 640 and 8 <= row.new_tokens <= 256 for row in ragged.rows)
    assert len({row.token_ids[:384] for row in shared.rows}) == 1
    assert len({row.token_ids[:400] for row in shared.rows}) == 128
    assert make_workload("ragged", vocab_size=50257, n_positions=1024) == ragged
    small = make_workload("shared_prefix", vocab_size=300, n_positions=256)
    assert all(len(row.token_ids) + row.new_tokens <= 256 for row in small.rows)


def test_no_repeat_finds_a_prefix_of_another() -> None:
    token_ids = tuple(range(40))
    seen = [renumbered(token_ids, repeat, 50257) for repeat in range(8)]
    assert len({tuple(ids[:1]) for ids in seen}) == 8
    assert all(0 <= token < 50257 for ids in seen for token in ids)


@pytest.mark.parametrize(
    "options",
    [
        ("--workload", "uniform", "--top-k", "0"),
        ("--workload", "shared_prefix"),
        pytest.param(
            ("--workload", "shared_prefix", "--attention", "padded"), marks=pytest.mark.slow
        ),
    ],
)
def test_bench_prints_what_belongs_together(options: tuple[str, ...]) -> None:
    done = run_gptbatch("bench", "--model", DEMO, "--repeats", "1", "--batch-size", "32", *options)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens_per_s"] == found["repeats_tokens_per_s"][0] > 0
    assert found["ceiling_tokens_per_s"] * found["ceiling_share"] == pytest.approx(
        found["tokens_per_s"], rel=0.01
    )
    operations = found["seconds_by_operation"]
    assert all(seconds >= 0 for seconds in operations.values()), operations
    assert operations["linears"] > 0
    assert operations["attention"] > 0
    assert found["ceiling_rates"]["gemm_gflops"] > 1
    shared = "shared_prefix" in options
    assert (found["prefix_share"] > 0.5) == (shared and found["attention"] == "ragged")


def test_scaling_draws_its_curves(tmp_path: Path) -> None:
    done = run_gptbatch("bench", "--model", DEMO, "scaling", "--points", "5", "--output", tmp_path)
    assert done.code == 0, done.stderr
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    curves = {
        curve["name"]: curve
        for curve in json.loads((tmp_path / "scaling.json").read_text())["curves"]
    }
    assert set(curves) == {"naive", "cached", "slide"}
    n_positions = json.loads((Path(DEMO) / "config.json").read_text())["n_positions"]
    assert max(curves["slide"]["steps"]) > n_positions
    assert max(curves["cached"]["steps"]) <= n_positions
    assert all(len(curve["steps"]) == len(curve["seconds"]) for curve in curves.values())
    assert len(curves["naive"]["quadratic"]) == 3


def test_bench_names_what_it_cannot_do() -> None:
    assert run_gptbatch("bench", "--workload", "nothing").code == 2
    done = run_gptbatch("bench", "--model", "no/such/model")
    assert done.code == 78
    assert "no/such/model" in done.stderr
