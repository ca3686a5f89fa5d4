"""The batch-invariance self-test, and how a run uses its result."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptbatch.pipeline import JobConfig, run_job
from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.errors import DeviceError, OutputConflictError
from gptbatch.pipeline.kv_cache import padded
from gptbatch.pipeline.kv_cache.padded import PaddedAttention, PaddedKVCache
from gptbatch.pipeline.kv_cache.spec import BackendName
from gptbatch.pipeline.model import self_test
from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.model.linear import Linear, use_threads
from gptbatch.pipeline.model.packing import describe_padding
from gptbatch.pipeline.model.padding import PADDING_PLANS
from gptbatch.pipeline.model.self_test import SelfTestReport, select_batch_invariant_kernels
from tests.conftest import has_kernels, our_model, random_model
from tests.processes import child_environment


class RowCounting(Linear):
    """A linear whose results depend on its row count, below `harmless` rows."""

    harmless = 10**9
    step = 1

    def _apply_to(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = super()._apply_to(x, residual)
        rows = x.shape[0]
        return y if rows >= self.harmless else y + 1e-3 * (rows % self.step)


def with_row_counting(model: GPT, *, harmless: int, step: int) -> GPT:
    block = model.blocks[1]
    first = model.blocks[0]
    assert isinstance(block, Block)
    assert isinstance(first, Block)
    for broken in (first.mlp_in, block.mlp_in):
        broken.__class__ = RowCounting
        assert isinstance(broken, RowCounting)
        broken.harmless, broken.step = harmless, step
    return model


@pytest.mark.parametrize("attention", ["ragged", "padded"])
def test_this_machine_passes(attention: BackendName) -> None:
    model = our_model(random_model(), attention=attention)
    report = select_batch_invariant_kernels(model)
    assert report.passed, report.failures
    assert report.padding_plan == describe_padding(model)
    assert report == select_batch_invariant_kernels(model), (
        "the digest is that of the weights and the machine"
    )
    assert (
        select_batch_invariant_kernels(
            our_model(random_model(seed=1), attention=attention)
        ).self_test_digest
        != report.self_test_digest
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_digest_tells_environments_apart(dtype: torch.dtype, seed: int) -> None:
    """Two backends reduce in other orders, although 16-bit logits are often equal."""
    theirs = random_model(seed=seed)
    backends: tuple[BackendName, ...] = ("ragged", "padded")
    digests = {
        select_batch_invariant_kernels(
            our_model(theirs, attention=attention, dtype=dtype)
        ).self_test_digest
        for attention in backends
    }
    assert len(digests) == 2


DIGEST = """
import torch
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.weights import load_gpt
demo = find_checkpoint("bundled:demo/model")
config = parse_config(demo.config, "config.json")
cpu = torch.device("cpu")
model = load_gpt(config, list(demo.weights), dtype=torch.bfloat16, device=cpu)
print(select_batch_invariant_kernels(model).self_test_digest)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(),
    reason="without bfloat16 instructions, all kernels compute in float32, with equal bits",
)
def test_the_digest_tells_vector_instructions_apart() -> None:
    found: set[str] = set()
    for changes in ({}, {"ATEN_CPU_CAPABILITY": "default"}):
        done = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=child_environment(**changes),
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("harmless", "step", "plan"), [(0, 7, "pad_8"), (32, 7, "pad_32"), (10**9, 64, "fixed_64")]
)
def test_padding_plans_are_tried_in_turn(harmless: int, step: int, plan: str) -> None:
    model = with_row_counting(our_model(random_model()), harmless=harmless, step=step)
    report = select_batch_invariant_kernels(model)
    assert (report.passed, report.padding_plan, model.padding_plan.name) == (True, plan, plan)


def test_a_linear_that_needs_fewer_rows_gets_them_alone() -> None:
    """A linear that depends on threads at 64 rows runs at 32 in every block; others at 64."""

    class ThreadCounting(Linear):
        def _apply_to(self, x: Tensor, residual: Tensor | None) -> Tensor:
            harmed = x.shape[0] > 32 and torch.get_num_threads() == 2
            return super()._apply_to(x, residual) + (1e-3 if harmed else 0.0)

    model = our_model(random_model())
    for block in model.blocks:
        assert isinstance(block, Block)
        block.mlp_out.__class__ = ThreadCounting
    for threads in (1, 2):
        with use_threads(threads):
            report = select_batch_invariant_kernels(model)
            assert (report.passed, report.padding_plan) == (True, "fixed_64, mlp_out 32"), (
                "whatever threads the run has"
            )
    assert {block.get_submodule("mlp_out").fixed_rows for block in model.blocks} == {32}
    assert model.lm_head.fixed_rows == 64


def test_a_failure_of_every_plan_is_named() -> None:
    class Clock(Linear):
        """Never the same twice."""

        calls = 0

        def _apply_to(self, x: Tensor, residual: Tensor | None) -> Tensor:
            Clock.calls += 1
            return super()._apply_to(x, residual) + 1e-3 * Clock.calls

    model = our_model(random_model())
    block = model.blocks[0]
    assert isinstance(block, Block)
    block.mlp_in.__class__ = Clock
    report = select_batch_invariant_kernels(model)
    assert not report.passed
    assert "rows of mlp_in" in report.failures
    assert "logits among others" in report.failures
    assert not any(failure.startswith("attention") for failure in report.failures)
    assert model.padding_plan == PADDING_PLANS[0]


class FaultyCache(PaddedKVCache):
    """Attention whose results change where the cache is wider than a sequence needs."""

    def attention_for(
        self, seq_indices: Sequence[int], positions: Sequence[int]
    ) -> PaddedAttention:
        attention = super().attention_for(seq_indices, positions)
        if len(set(seq_indices)) > 1 and max(positions) > 60:
            for i, now in enumerate(attention.rounds):
                attention.rounds[i] = dataclasses.replace(
                    now, masked=now.masked.clone().index_fill_(-1, torch.tensor([0]), True)
                )
        return attention


def test_a_fault_that_needs_a_wide_cache_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptbatch.pipeline.kv_cache.interface.PaddedKVCache", FaultyCache)
    report = select_batch_invariant_kernels(our_model(random_model()))
    assert "attention beside others" in report.failures
    assert not {"attention alone", "attention in chunks"} & set(report.failures)


@pytest.mark.parametrize("harmless", [1, 20])
def test_products_that_depend_on_the_batch_are_replaced(
    harmless: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products that depend on the number of sequences, as on some GPUs; pairwise sums do not."""
    attend = padded._attend

    def shifting(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return attend(q, k, v, hidden) + (1e-3 if len(q) > harmless else 0.0)

    model = our_model(random_model())
    idx = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        expected = model(idx)
    monkeypatch.setattr(padded, "_attend", shifting)
    report = select_batch_invariant_kernels(model)
    assert (report.passed, report.padding_plan, model.reduction_order) == (
        True,
        "pad_8",
        "pairwise",
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(idx), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    select_batch_invariant_kernels(model)
    assert model.reduction_order == "matmul", "as long as they do"


@pytest.mark.parametrize("part", ["mlp_in", "lm_head"])
def test_a_fault_at_many_rows_or_with_other_threads_is_found(part: str) -> None:
    class ManyRows(Linear):
        def _apply_to(self, x: Tensor, residual: Tensor | None) -> Tensor:
            return super()._apply_to(x, residual) + (1e-3 if x.shape[0] > 100 else 0.0)

    class Threads(Linear):
        def _apply_to(self, x: Tensor, residual: Tensor | None) -> Tensor:
            return super()._apply_to(x, residual) + (
                1e-3 if x.shape[0] > 100 and torch.get_num_threads() == 1 else 0.0
            )

    for kind in (ManyRows, Threads):
        model = our_model(random_model())
        broken = model.lm_head if part == "lm_head" else model.blocks[0].get_submodule(part)
        broken.__class__ = kind
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            report = select_batch_invariant_kernels(model)
        finally:
            torch.set_num_threads(before)
        assert (report.passed, report.padding_plan) == (True, "fixed_64"), (
            "64 rows at a time avoid the fault"
        )


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    select_batch_invariant_kernels(our_model(random_model()))
    assert torch.get_num_threads() == before


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path) -> dict[str, str | int]:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n{"prompt": "To be"}\n')
    return {
        "model": str(checkpoint),
        "input": str(tmp_path / "prompts.jsonl"),
        "output": str(tmp_path / "out"),
        "max_new_tokens": 5,
    }


def test_the_result_is_recorded(config: dict[str, str | int], tmp_path: Path) -> None:
    level = "portable" if has_kernels() else "verified"
    assert run_job(JobConfig.model_validate(config)).batch_invariance == level
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    environment = manifest["environment"]
    assert set(environment) == {
        "attention",
        "reduction_order",
        "linears",
        "padding_plan",
        "torch",
        "device_class",
        "noise_version",
        "arithmetic",
        "self_test_digest",
    }
    assert len(environment["self_test_digest"]) == 64
    assert manifest["batch_invariance"] == level


def test_off_skips_the_check(config: dict[str, str | int], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(model: GPT) -> SelfTestReport:
        raise AssertionError

    monkeypatch.setattr(self_test, "select_batch_invariant_kernels", never)
    assert (
        run_job(JobConfig.model_validate({**config, "batch_invariance": "off"})).batch_invariance
        == "off"
    )


def test_a_machine_that_fails(
    config: dict[str, str | int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only `auto` continues, with one warning, and records unverified; require stops."""

    def failing(model: GPT) -> SelfTestReport:
        return SelfTestReport(
            failures=("rows of mlp_in", "logits among others"),
            padding_plan="pad_8",
            self_test_digest="0" * 64,
        )

    monkeypatch.setattr(self_test, "select_batch_invariant_kernels", failing)
    with pytest.raises(DeviceError, match=r"rows of mlp_in, logits among others differ") as caught:
        run_job(JobConfig.model_validate({**config, "batch_invariance": "require"}))
    assert caught.value.exit_code == 78
    assert [path.name for path in Path(str(config["output"])).iterdir()] == [".gptbatch"]
    with caplog.at_level(logging.WARNING, logger="gptbatch"):
        assert run_job(JobConfig.model_validate(config)).batch_invariance == "unverified"
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert RunReader(Path(str(config["output"]))).facts["batch_invariance"] == "unverified"


def test_a_complete_run_is_not_taken_for_a_verified_one(config: dict[str, str | int]) -> None:
    run_job(
        JobConfig.model_validate(
            {**config, "batch_invariance": "off", "engine": {"attention": "padded"}}
        )
    )
    assert run_job(JobConfig.model_validate(config)).rows_kept == 2
    with pytest.raises(OutputConflictError, match="whose batch_invariance is off, not verified"):
        run_job(JobConfig.model_validate({**config, "batch_invariance": "require"}))
    with pytest.raises(OutputConflictError, match="attention padded, not ragged"):
        run_job(JobConfig.model_validate({**config, "engine": {"attention": "ragged"}}))
    assert (
        run_job(JobConfig.model_validate({**config, "engine": {"attention": "padded"}})).rows_kept
        == 2
    )
