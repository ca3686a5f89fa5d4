"""Sections `machine` and `graph-nodes`: what the GPU is, and what a node of a graph costs."""

from __future__ import annotations

import functools
import subprocess
import time
from typing import Any

import torch
import triton

from benchmarks.cuda.common import DTYPES, random, report, time_us


def machine() -> None:
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "capability": torch.cuda.get_device_capability(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "driver": subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout,
        "date": time.strftime("%Y-%m-%d"),
    }
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    found["copy_gb_s"] = 2 * 4 * 2**28 / time_us(lambda: target.copy_(source), 1) / 1000
    for name, size in (("bfloat16", 8192), ("float32", 4096)):
        a, b = (random(size, size, dtype=DTYPES[name]) for _ in range(2))
        y = torch.empty_like(a)
        us = time_us(functools.partial(torch.matmul, a, b, out=y), 1, 10)
        found[f"matmul_{name}_tflops"] = 2 * size**3 / us / 1e6
    report(found)


# triton compiles it: annotations of types would mean something else
@triton.jit  # type: ignore[untyped-decorator]
def add_one_kernel(x, SIZE: triton.language.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    place = triton.language.program_id(0) * SIZE + triton.language.arange(0, SIZE)
    triton.language.store(x + place, triton.language.load(x + place) + 1.0)


def graph_nodes() -> None:
    """Microseconds per node of a graph of dependent kernels, by programs and with early launch."""
    x = torch.zeros(2**20, device="cuda")
    found = {}
    for programs in (1, 132, 768):
        for early in (False, True):

            def launches(programs: int = programs, early: bool = early) -> None:
                for _ in range(500):
                    add_one_kernel[(programs,)](x, SIZE=128, num_warps=4, launch_pdl=early)

            key = f"{programs} programs{', launch_pdl' if early else ''}"
            found[key] = round(time_us(launches, 500), 3)
            report(found)
