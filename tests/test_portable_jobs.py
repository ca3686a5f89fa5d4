"""Jobs on machines that differ give equal columns, and one machine goes on where another stopped.

Instruction sets, compilers and C libraries stand for machines. Child processes run the jobs
(tests/portable_jobs.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.bench.random_model import write_random_checkpoint
from tests.conftest import has_kernels, random_model, run_fresh, save_tokenizer
from tests.paths import REPOSITORY
from tests.processes import LIMIT_S, child_environment

pytestmark = pytest.mark.slow

COLUMNS = [
    *("prompt_id", "completion_token_ids", "completion", "finish_reason", "min_decision_margin"),
    *("logits_digest", "token_logprobs", "top_logprob_ids", "top_logprobs"),
]
# The settings of the rows, in turn.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.07},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.003},
    {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.1},
    {"temperature": 1.0, "logit_bias": {"7": 0.3}, "presence_penalty": 0.7},
)
# Two layers have every product of the twelve of gpt2.
GPT2 = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}
ODD = {"n_layer": 2, "n_head": 3, "n_embd": 39, "vocab_size": 301, "n_positions": 150}
# Prompts, their characters at most, and new tokens, of each model.
SIZES = {"demo": (16, 100, 24), "odd": (24, 100, 40), "gpt2": (8, 20, 3)}
# The columns of digests and log probabilities need all logits. Without them, CPUs with bfloat16
# instructions sample in two passes, and others do not.
JOBS = (
    *("demo-auto", "demo-int8", "odd-auto", "odd-int8"),
    *("gpt2-auto", "gpt2-int8", "gpt2-auto-without-digests"),
)
# The C library has other functions for CPUs without these.
NO_FMA = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA"}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of configs: demo, odd sizes and the shape of gpt2, with both caches."""
    if not has_kernels():
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("jobs")
    random_model(**ODD).save_pretrained(folder / "odd")
    save_tokenizer(folder / "odd")
    write_random_checkpoint(folder / "gpt2", **GPT2)
    for name in JOBS:
        model, cache_dtype, *others = name.split("-")
        count, characters, new_tokens = SIZES[model]
        text = "The king is dead, and long live the queen! " * 3
        rows = [
            {"id": f"r{i}", "prompt": text[: 3 + 9 * i % characters], **SETTINGS[i % len(SETTINGS)]}
            for i in range(count)
        ]
        prompts = folder / f"{model}.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "model": "bundled:demo/model" if model == "demo" else str(folder / model),
            "input": str(prompts),
            "output": str(folder / "unused"),
            "max_new_tokens": new_tokens,
            "part_rows": count // 4,
            "logprobs": None if others else 2,
            "record_logits_digest": not others,
            "ignore_eos": True,
            "batch_invariance": "portable",
            "engine": {"batch_size": 7, "cache_dtype": cache_dtype},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_jobs(
    jobs: Path, output: Path, environment: dict[str, str] | None = None, *, threads: int = 2
) -> Path:
    """Run all jobs in a child process and return the folder of their outputs."""
    is_slow = environment is not None and environment.get("ATEN_CPU_CAPABILITY") == "default"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.portable_jobs", str(jobs), str(output)),
            *("--threads", str(threads)),
            # Without vector instructions, the self-test of these sizes takes minutes.
            *(("--untested", "gpt2") if is_slow else ()),
        ],
        cwd=REPOSITORY,
        env=child_environment(**(environment or {})),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return output


@pytest.fixture(scope="module")
def expected(jobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the outputs with all instructions of this CPU."""
    return run_jobs(jobs, tmp_path_factory.mktemp("expected"))


@pytest.fixture(scope="module")
def clang_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder for kernels that clang builds."""
    if shutil.which("clang++") is None:
        pytest.skip("no clang++")
    return tmp_path_factory.mktemp("clang")


def skip_without(capability: str) -> None:
    """Skip the test on a CPU without a capability, as ATEN_CPU_CAPABILITY spells it."""
    names = ["default", "avx2", "avx512"]
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best not in names or names.index(capability) > names.index(best):
        pytest.skip(f"this CPU does not have {capability}")


def assert_equal_outputs(found: Path, expected: Path) -> None:
    """Compare all columns of all jobs that do not hold times."""
    assert {path.name for path in found.iterdir()} == set(JOBS)
    for name in JOBS:
        a, b = (pq.read_table(folder / name, columns=COLUMNS) for folder in (found, expected))
        for column in COLUMNS:
            assert a[column] == b[column], f"{name}: {column} differs"
        assert a["min_decision_margin"].null_count == 0
        assert (a["logits_digest"].null_count == 0) == ("without" not in name)
        runs = [RunReader(folder / name) for folder in (found, expected)]
        assert runs[0].content_digest == runs[1].content_digest, name
        levels = {run.facts["batch_invariance"] for run in runs}
        assert levels <= ({"portable", "off"} if name.startswith("gpt2") else {"portable"})


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_jobs_are_equal_with_other_instructions_and_threads(
    jobs: Path, expected: Path, tmp_path: Path, capability: str, threads: int
) -> None:
    skip_without(capability)
    if threads in (2, 3) and capability == "default":
        pytest.skip("takes the longest; covered with 1 and 4")
    environment = {"ATEN_CPU_CAPABILITY": capability}
    found = run_jobs(jobs, tmp_path, environment, threads=threads)
    assert_equal_outputs(found, expected)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_jobs_are_equal_with_clang(
    jobs: Path, expected: Path, clang_cache: Path, tmp_path: Path, capability: str
) -> None:
    skip_without(capability)
    environment = {
        "CXX": "clang++",
        "XDG_CACHE_HOME": str(clang_cache),
        "ATEN_CPU_CAPABILITY": capability,
    }
    assert_equal_outputs(run_jobs(jobs, tmp_path, environment), expected)


def test_jobs_are_equal_with_other_functions_of_the_c_library(
    jobs: Path, expected: Path, tmp_path: Path
) -> None:
    """The functions do differ: `math.log` and powers, on x86-64 with glibc."""
    if sys.platform != "linux":
        pytest.skip("needs glibc")
    assert_equal_outputs(run_jobs(jobs, tmp_path, NO_FMA), expected)


@pytest.fixture(params=["demo-auto", "odd-int8"])
def continued(request: pytest.FixtureRequest, jobs: Path, tmp_path: Path) -> Path:
    """Return an output that one machine began and another one finished."""
    skip_without("avx2")
    output = tmp_path / "out"
    options = ("generate", "--config", jobs / f"{request.param}.yaml", "--output", output)
    count, *_ = SIZES[request.param.partition("-")[0]]
    half = run_fresh(*options, "--limit", str(count // 2))
    assert half.code == 0, half.stderr
    other = {"ATEN_CPU_CAPABILITY": "default", **NO_FMA}
    rest = run_fresh(*options, env=other)
    assert rest.code == 0, rest.stderr
    assert (rest.summary["rows_kept"], rest.summary["complete"]) == (count // 2, True)
    return output


def test_one_machine_goes_on_where_another_stopped_and_a_third_checks(
    continued: Path, expected: Path, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["continued"]
    third = {"ATEN_CPU_CAPABILITY": "avx2"}
    assert RunReader(continued).content_digest == RunReader(expected / name).content_digest
    verified = run_fresh("verify", continued, "--all", env=third)
    assert verified.code == 0, verified.stdout
    count, *_ = SIZES[name.partition("-")[0]]
    assert verified.summary | {"verify_s": 0} == {
        "complete": True,
        "rows_checked": count,
        "samples_checked": count,
        "mismatches": 0,
        "near_ties": 0,
        "error_rows_skipped": 0,
        "judged": "exactly",
        "because": [],
        "first_mismatch": None,
        "verify_s": 0,
    }
    for prompt_id in ("r2", f"r{count - 1}"):
        replayed = run_fresh("replay", continued, "--prompt-id", prompt_id, "--json", env=third)
        found = replayed.summary
        assert (found["equal"], found["because"]) == (True, []), replayed.stdout
        assert found["min_decision_margin"] == found["recorded_min_margin"]
        assert found["logits_digest"] == found["recorded_logits_digest"] is not None
    compared = run_fresh("diff", continued, expected / name, env=third)
    assert compared.code == 0, compared.stdout
    assert compared.summary["equal"] == count
    assert compared.summary["equal_from_other_logits"] == 0
