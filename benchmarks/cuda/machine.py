"""Sections `machine` and `graph-nodes`: what the GPU is, and what a node of a graph costs."""

from __future__ import annotations

import functools
import os
import subprocess
import time
from typing import Any

import torch
import triton
from triton import language as tl

from benchmarks.cuda.common import DEVICE, DTYPES, IS_FAKE, random, report, time_us

# A fake device multiplies smaller matrices.
SCALE = 64 if IS_FAKE else 1
SIZE = 2**28 // SCALE**2


def machine() -> None:
    """Say what the machine is, and what it reaches: bytes copied and products of matrices."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
    }
    if not IS_FAKE:
        properties = torch.cuda.get_device_properties(0)
        found["gpu"], found["memory_bytes"] = properties.name, properties.total_memory
        found["capability"] = torch.cuda.get_device_capability()
        found["multiprocessors"] = properties.multi_processor_count
        query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
        found["driver"] = subprocess.getoutput(f"nvidia-smi {query} --format=csv")
    report(found)
    source = torch.randn(SIZE, device=DEVICE)
    target = torch.empty_like(source)
    found["copy_gb_s"] = 2 * 4 * SIZE / time_us(lambda: target.copy_(source), 1) / 1000
    report(found)
    for name, size in (("bfloat16", 8192 // SCALE), ("float32", 4096 // SCALE)):
        a, b = (random(size, size, dtype=DTYPES[name]) for _ in range(2))
        y = torch.empty_like(a)
        us = time_us(functools.partial(torch.matmul, a, b, out=y), 1, 10)
        found[f"matmul_{name}_tflops"] = 2 * size**3 / us / 1e6
        report(found)


# triton compiles it: annotations of types would mean something else
@triton.jit  # type: ignore[untyped-decorator]
def add_one_kernel(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x + place, tl.load(x + place) + 1.0)


def graph_nodes() -> None:
    """Microseconds per node of a graph of dependent kernels, by programs and with early launch."""
    x = torch.zeros(2**20, device=DEVICE)
    found = {}
    nodes = 2 if IS_FAKE else 500
    for programs in (1,) if IS_FAKE else (1, 132, 768):
        for early in (False, True):

            def launches(programs: int = programs, early: bool = early) -> None:
                for _ in range(nodes):
                    add_one_kernel[(programs,)](x, SIZE=128, num_warps=4, launch_pdl=early)

            key = f"{programs} programs{', launch_pdl' if early else ''}"
            found[key] = round(time_us(launches, nodes), 3)
            report(found)
