"""The machine code of the Triton kernels, compiled for GPUs that are not at hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.paths import PYTHONPATH, REPOSITORY

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The instruction of the tensor cores by compute capability.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# What is not rounded as IEEE 754 says.
INEXACT = ("sqrt.approx", "div.full", "ex2.approx", ".ftz")


def compiled(calls: list[str], **environment: str) -> list[Any]:
    """Evaluate calls of tests/cuda_compile.py in a process where triton does not interpret."""
    program = (
        f"import json\nfrom tests.cuda_compile import *\nprint(json.dumps([{', '.join(calls)}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(kernels: list[list[dict[str, Any]]], capability: int, tensor_core: str | None) -> None:
    """Check memory, and that float32 has no tensor cores while half precision has its own."""
    for kernel in (kernel for launch in kernels for kernel in launch):
        assert kernel["LDL"] == kernel["STL"] == kernel["stack_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], kernel
        counts = {name: kernel[name] for name in TENSOR_CORE.values()}
        expected = tensor_core if kernel["kernel"] == "linear_kernel" else None
        assert {name for name, count in counts.items() if count} <= {expected}, kernel
        assert expected is None or counts[expected] > 0, kernel
        assert not any(kernel[text] for text in INEXACT), kernel


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_float32_runs_on_fma_alone_and_half_precision_on_the_tensor_cores(capability: int) -> None:
    """Some tiles of the table, as the package launches them."""
    step = 3 if capability == 90 else 6
    for dtype, tensor_core in (("float32", None), ("bfloat16", TENSOR_CORE[capability])):
        call = f"compiled(name, '{dtype}', {capability}, tile=tile)"
        kernels = compiled([f"*[{call} for name, tile in tiles(torch.{dtype})[::{step}]]"])
        assert len(kernels) == -(-(12 if dtype == "float32" else 9) // step)
        check(kernels, capability, tensor_core)
        for (kernel,) in kernels:
            assert dtype != "float32" or kernel["FFMA"] > 0, kernel


def test_the_other_kernels_do_not_spill_and_round_as_ieee_754_says() -> None:
    names = ("embed", "norm", "store", "attend", "adjust", "logprobs", "advance")
    calls = [f"compiled('{name}', 'float32', 90)" for name in names]
    calls += [f"compiled('{name}', 'float32', 90, int8=True)" for name in ("store", "attend")]
    calls += ["compiled('attend', 'bfloat16', 90)", "compiled('norm', 'bfloat16', 90)"]
    kernels = compiled(calls)
    check(kernels, 90, None)
    (norm,) = kernels[1]
    assert (norm["sqrt.rn.f64"], norm["div.rn.f64"]) == (1, 2)
    (adjust, _) = kernels[4]
    assert adjust["div.rn.f32"] > 0
    assert adjust["fma.rn.f32"] == 0
    (measure, *_) = kernels[5]
    assert measure["fma.rn.f64"] == 0


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_samplers_do_not_spill_and_round_as_ieee_754_says(capability: int) -> None:
    (kernels,) = compiled([f"compiled('sample', 'float32', {capability})"])
    check([kernels], capability, None)
    for kernel in kernels:
        # The logarithm: its constants in float64, and no fused multiply-add.
        assert kernel["0d3FE5555555555593"] > 0, kernel
        assert kernel["fma.rn.f64"] == 0, kernel
    # With and without top_p: two and three programs of 256 threads per multiprocessor.
    registers = [kernel["registers"] for kernel in kernels]
    assert registers[0] <= 128, registers
    assert registers[1] <= 80, registers


@pytest.mark.parametrize(("capability", "dependent"), [(80, True), (90, True), (90, False)])
def test_dependent_kernels_wait_before_they_read_or_write(capability: int, dependent: bool) -> None:
    """Compute capability 8.0 has no such instruction, and without the constant there is none."""
    names = ("embed", "norm", "linear", "store", "attend", "adjust", "logprobs", "sample")
    options = f"{capability}, dependent={dependent}"
    calls = [f"compiled('{name}', 'bfloat16', {options})" for name in (*names, "advance")]
    calls += [f"compiled('{name}', 'float32', {options})" for name in ("attend", "linear")]
    calls += [f"compiled('attend', 'bfloat16', {options}, int8=True)"]
    kernels = [kernel for launch in compiled(calls) for kernel in launch]
    assert len({kernel["kernel"] for kernel in kernels}) == 14
    can_depend = dependent and capability >= 90
    for kernel in kernels:
        assert kernel["is_dependent"] == can_depend, kernel
        assert kernel["waits_first"] == (True if can_depend else None), kernel


@pytest.mark.parametrize(("dtype", "cache"), [("float32", "auto"), ("bfloat16", "int8")])
def test_all_kernels_of_a_run_are_compiled_first_and_once(
    tmp_path: Path, dtype: str, cache: str
) -> None:
    """Side by side, before the self-test. Nothing is compiled in another process afterwards."""
    call = [f"compiled_by_a_run(90, '{dtype}', '{cache}')"]
    (first,) = compiled(call, TRITON_CACHE_DIR=str(tmp_path))
    assert re.fullmatch(
        rf"compiled \d\d Triton kernels in \d+\.\d s; they are kept in {tmp_path}\n", first["said"]
    )
    assert compiled(call, TRITON_CACHE_DIR=str(tmp_path)) == [{"said": "", "missing": []}]
    assert first["missing"] == []


def test_vllm_48391_and_51902_one_binary_serves_all_row_counts() -> None:
    """Of every kernel but the linears, whose tile follows the rows and changes no bit."""
    names = ("embed", "norm", "store", "attend", "sample", "advance")
    calls = [f"hashes('{name}', 'float32', 90, (1, 9, 10, 256, 257, 1024))" for name in names]
    for name, found in zip(names, compiled(calls), strict=True):
        assert all(each == found[0] for each in found), name


def test_vllm_55131_and_55466_float32_over_a_power_of_2_is_fma_alone() -> None:
    calls = [f"compiled('linear', 'float32', 90, depth={depth})" for depth in (1024, 4096)]
    check(compiled(calls), 90, None)
