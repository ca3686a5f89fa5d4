"""Portable runs: golden digests, the level that is recorded, and environments that are one."""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.audit.diff import settings_that_differ
from gptbatch.pipeline.audit.loaded_run import LoadedRun, Overrides
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.doctor.self_tests import demo_digest
from gptbatch.pipeline.engine.logarithm import log
from gptbatch.pipeline.errors import DeviceError, OutputConflictError
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.model import golden, loading, self_test
from gptbatch.pipeline.output.environment import environment_differences
from gptbatch.pipeline.output.part_file import read_footer
from gptbatch.pipeline.output.status import output_status
from tests.conftest import has_kernels, run_gptbatch

HERE = {"arithmetic": 1, "noise_version": 1, "self_test_digest": "a" * 64}
CACHE_DTYPES: tuple[CacheDtype, ...] = ("auto", "int8")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if not has_kernels():
        pytest.skip("no C++ compiler")


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"id": f"r{i}", "prompt": "The king " * (1 + i % 3)} for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(checkpoint),
        "input": str(tmp_path / "prompts.jsonl"),
        "output": str(tmp_path / "out"),
        "max_new_tokens": 5,
        "part_rows": 4,
        "record_logits_digest": True,
    }


def run(config: dict[str, Any], **changes: Any) -> Any:
    return run_job(JobConfig.model_validate({**config, **changes}))


def on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs record another CPU and another version of torch."""
    monkeypatch.setattr(loading, "device_class", lambda device: "aarch64 NEON")
    monkeypatch.setattr(torch, "__version__", "9.9.9")


# -- the digests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_this_machine_gives_the_digests_in_the_repository(cache_dtype: CacheDtype) -> None:
    assert golden.golden_digest(cache_dtype) == golden.GOLDEN_DIGESTS[cache_dtype]
    assert demo_digest(cache_dtype) == golden.DEMO_DIGESTS[cache_dtype]


def test_golden_digests_do_not_depend_on_threads() -> None:
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = golden.golden_digest.__wrapped__("auto")
        assert found == golden.GOLDEN_DIGESTS["auto"]


def test_embeddings_are_added_as_by_torch_and_keep_subnormals() -> None:
    embed = torch.ops.gptbatch.embed
    generator = torch.Generator().manual_seed(0)
    for count, dtype in ((7, torch.float32), (700, torch.float32), (700, torch.bfloat16)):
        wte, wpe = (torch.randn(n, 65, generator=generator).to(dtype) for n in (50, 30))
        tokens, positions = torch.arange(count) % 50, torch.arange(count) % 30
        assert torch.equal(embed(tokens, positions, wte, wpe), wte[tokens] + wpe[positions])
        # Subnormal in both dtypes.
        wte, wpe = wte * 2.0**-132, wpe * 2.0**-132
        expected = wte[tokens] + wpe[positions]
        assert expected.count_nonzero() > 0.8 * expected.numel()
        torch.set_flush_denormal(True)
        try:
            found = embed(tokens, positions, wte, wpe)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(found, expected)
    table = torch.zeros(3, 2)
    for wrong in (-1, 3):
        with pytest.raises(RuntimeError, match=f"tokens holds {wrong}; the table has 3 rows"):
            embed(torch.tensor([0, wrong]), torch.tensor([0, 1]), table, table)


def test_log_is_accurate() -> None:
    """Its bits are those of the C++ kernels: tests/test_arithmetic.py."""
    rng = random.Random(0)
    for _ in range(2000):
        x = math.exp(rng.uniform(-700, 700))
        assert abs(log(x) - math.log(x)) <= math.ulp(math.log(x))
    assert log(1.0) == 0
    assert log(5e-324) == pytest.approx(math.log(5e-324), rel=1e-15)


# -- the level of a run ----------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_the_level_is_recorded_everywhere(config: dict[str, Any], cache_dtype: CacheDtype) -> None:
    engine = {"cache_dtype": cache_dtype}
    summary = run(config, batch_invariance="portable", engine=engine)
    assert summary.batch_invariance == "portable"
    output = Path(config["output"])
    manifest = json.loads((output / "_manifest.json").read_text())
    footer = read_footer(output / "part-000001.parquet")
    assert footer is not None
    for facts in (manifest, footer):
        assert facts["batch_invariance"] == "portable"
        assert facts["environment"]["arithmetic"] == golden.ARITHMETIC
    assert output_status(output).batch_invariance == "portable"
    shown = run_gptbatch("status", output)
    line = "batch invariance  portable: bits depend on neither the batch nor the machine\n"
    assert line in shown.stdout


@pytest.mark.parametrize("engine", [{"attention": "padded"}, {"dtype": "bfloat16"}])
def test_other_runs_are_verified(config: dict[str, Any], engine: dict[str, str]) -> None:
    assert run(config, engine=engine).batch_invariance == "verified"
    manifest = json.loads((Path(config["output"]) / "_manifest.json").read_text())
    assert manifest["environment"]["arithmetic"] is None


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("dtype=bfloat16", "engine.dtype: float32, not bfloat16"),
        ("device=cuda", "engine.device: cpu, not cuda"),
        ("attention=padded", "engine.attention: ragged, not padded"),
    ],
)
def test_portable_is_refused_with_settings_that_forbid_it(
    tmp_path: Path, setting: str, problem: str
) -> None:
    name, value = setting.split("=")
    refused = run_gptbatch(
        *("generate", "--config", "demo", "--output", tmp_path / "out"),
        *("--batch-invariance", "portable", f"--{name}", value),
    )
    assert refused.code == 2
    assert f"batch_invariance is portable, which needs {problem}" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_portable_is_refused_without_a_compiler(tmp_path: Path) -> None:
    refused = run_gptbatch(
        *("generate", "--config", "demo", "--limit", "2", "--output", tmp_path / "out"),
        *("--batch-invariance", "portable"),
        env={"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert refused.code == 78
    assert "portable, which needs the C++ kernels: no C++ compiler" in refused.stderr
    assert "install g++ or clang++" in refused.stderr


def test_other_golden_digests(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`portable` stops. `auto` goes on with one warning, and the run is only verified."""
    monkeypatch.setitem(golden.GOLDEN_DIGESTS, "auto", "f" * 64)
    with pytest.raises(DeviceError, match="kernels do not compute arithmetic 1 here") as caught:
        run(config, batch_invariance="portable")
    assert caught.value.exit_code == 78
    with caplog.at_level(logging.WARNING, logger="gptbatch"):
        assert run(config).batch_invariance == "verified"
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1
    assert "build them with another compiler (CXX)" in caplog.text


def test_a_failed_self_test_is_not_portable(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = self_test.SelfTestReport(
        failures=("rows of mlp_in",), padding_plan="pad_8", self_test_digest="0" * 64
    )
    monkeypatch.setattr(self_test, "select_batch_invariant_kernels", lambda model: report)
    with pytest.raises(DeviceError, match=r"is portable, but .* \(rows of mlp_in differ\)"):
        run(config, batch_invariance="portable")
    assert run(config).batch_invariance == "unverified"


def test_a_run_of_a_lower_level_is_not_continued_as_portable(config: dict[str, Any]) -> None:
    run(config, engine={"attention": "padded"})
    with pytest.raises(OutputConflictError, match="batch_invariance is verified, not portable"):
        run(config, batch_invariance="portable")
    assert run(config, batch_invariance="require").rows_kept == 8


def test_a_portable_run_fulfils_require(config: dict[str, Any]) -> None:
    run(config)
    for level in ("require", "portable", "auto"):
        assert run(config, batch_invariance=level).rows_kept == 8


# -- environments ----------------------------------------------------------------------------------


def facts(level: str = "portable", **environment: Any) -> dict[str, Any]:
    return {"batch_invariance": level, "environment": {**HERE, "torch": "1", **environment}}


@pytest.mark.parametrize(
    ("a", "b", "differing"),
    [
        (facts(), facts(torch="2", device_class="another"), []),
        (facts(), facts(arithmetic=2), ["arithmetic"]),
        (facts(), facts(noise_version=2), ["noise_version"]),
        # One of the machines computes wrongly.
        (facts(), facts(self_test_digest="b" * 64), ["self_test_digest"]),
        (facts("verified", arithmetic=None), facts("verified", arithmetic=None), []),
        (facts("verified"), facts("verified", torch="2"), ["torch"]),
        (facts("verified"), facts(), ["batch_invariance"]),
        (facts(), facts("unverified", torch="2"), ["batch_invariance", "torch"]),
        ({}, {}, []),
    ],
)
def test_one_function_says_whether_environments_are_one(
    a: dict[str, Any], b: dict[str, Any], differing: list[str]
) -> None:
    assert sorted(environment_differences(a, b)) == differing
    assert sorted(environment_differences(b, a)) == differing


def test_a_run_goes_on_and_is_checked_on_another_machine(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    run(config, output=str(whole))
    run(config, limit=4)
    on_another_machine(monkeypatch)
    assert (run(config).rows_kept, run(config, limit=None).rows_kept) == (4, 8)
    found = RunReader(Path(config["output"]))
    machines = {
        footer["environment"]["device_class"]
        for path in found.parts
        if (footer := read_footer(path)) is not None
    }
    assert len(machines) == 2
    assert len(found.environments) == 1
    assert LoadedRun(found, Overrides()).reasons_bits_may_differ() == []
    columns = ["completion_token_ids", "logits_digest", "min_decision_margin"]
    assert pq.read_table(whole, columns=columns) == pq.read_table(
        Path(config["output"]), columns=columns
    )
    assert settings_that_differ(RunReader(whole), found) == []


def test_verified_runs_stay_where_they_began(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = {"attention": "padded"}
    run(config, limit=4, engine=engine)
    on_another_machine(monkeypatch)
    with pytest.raises(OutputConflictError, match="is aarch64 NEON"):
        run(config, engine=engine)


def test_a_portable_run_is_audited_on_a_cpu(config: dict[str, Any]) -> None:
    """A machine with a GPU computes it on the CPU, unless an option names the GPU."""
    run(config)
    found = RunReader(Path(config["output"]))
    assert LoadedRun(found, Overrides()).config.engine.device == "cpu"
    assert LoadedRun(found, Overrides(device="cuda")).config.engine == EngineConfig(device="cuda")
