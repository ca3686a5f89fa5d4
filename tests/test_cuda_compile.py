"""The machine code of the Triton kernels, compiled for GPUs that are not at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.paths import PYTHONPATH, REPOSITORY

pytest.importorskip("triton")

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The instruction of the tensor cores by compute capability.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def compiled(calls: list[str]) -> list[dict[str, Any]]:
    """Evaluate calls of tests/cuda_compile.py in a process where triton does not interpret."""
    program = (
        f"import json\nfrom tests.cuda_compile import *\nprint(json.dumps([{', '.join(calls)}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_float32_uses_fma_alone_and_half_precision_the_tensor_cores(capability: int) -> None:
    float32 = [
        f"linear('float32', Tile(64, 64, 16, 8, 3), 768, {capability})",
        f"linear('float32', Tile(128, 64, 16, 8, 3), 3072, {capability})",
        f"qkv('float32', Tile(64, 32, 16, 4, 3), {capability})",
        f"attend('float32', True, 2, {capability})",
    ]
    half = [
        f"linear('bfloat16', Tile(64, 32, 128, 4, 4), 768, {capability})",
        f"linear('float16', Tile(128, 64, 64, 8, 3), 3072, {capability})",
        f"qkv('bfloat16', Tile(64, 32, 128, 4, 4), {capability})",
    ]
    found = compiled([*float32, *half])
    for call, kernel in zip([*float32, *half], found, strict=True):
        assert kernel["LDL"] == kernel["STL"] == 0, (call, kernel)
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], (call, kernel)
        is_half = call in half
        tensor_core = {name: kernel[name] for name in TENSOR_CORE.values()}
        assert (tensor_core[TENSOR_CORE[capability]] > 0) == is_half, (call, kernel)
        assert is_half or not any(tensor_core.values()), (call, kernel)
        assert is_half or kernel["FFMA"] > 0, (call, kernel)


@pytest.mark.slow
def test_the_other_kernels_do_not_spill() -> None:
    calls = ["norm('bfloat16', 90)", "add_norm('float32', 90)", "embed('bfloat16', 90)"]
    calls += ["attend('bfloat16', False, 1, 90)", "sample(8, 90)"]
    for call, kernel in zip(calls, compiled(calls), strict=True):
        assert kernel["stack_bytes"] == 0, (call, kernel)
