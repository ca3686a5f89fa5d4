"""Sections `build` and `start`: what is built and compiled before the first token."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cuda.common import CASES, CONFIG, DEVICE, DTYPES, IS_FAKE, report, run_part
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.kernels.compiler import KernelError
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.compiling import compile_kernels
from gptbatch.pipeline.system.machine import cores


def build() -> None:
    """Fill the caches of the later sections: the C++ kernels, and the Triton kernels of all runs.

    The C++ compiler runs beside the Triton compiler.
    """
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(1) as executor:
        cpp = executor.submit(build_cpp)
        for name, cache_dtype in CASES:
            found[f"{name} cache {cache_dtype}"] = compiled(name, cache_dtype, cores().threads)
            report(found)
        found["C++"] = cpp.result()
    report(found)


def build_cpp() -> dict[str, Any]:
    """Build and load the C++ kernels; return the seconds, or why they cannot be built."""
    began = time.monotonic()
    try:
        load_kernels()
    except KernelError as error:
        return {"problem": str(error)[-1000:]}
    return {"seconds": round(time.monotonic() - began, 2)}


def compiled(name: str, cache_dtype: CacheDtype, threads: int) -> dict[str, float]:
    """Compile for a model with one block, which launches all; return the kernels and seconds."""
    model = random_model(
        replace(CONFIG, n_layer=1),
        dtype=DTYPES[name],
        device=torch.device(DEVICE),
        backend=TRITON,
        cache_dtype=cache_dtype,
    )
    began = time.monotonic()
    # The interpreter compiles nothing.
    count = 0 if IS_FAKE else compile_kernels(model, threads)
    return {"kernels": count, "seconds": round(time.monotonic() - began, 2)}


def start() -> None:
    """Compile the kernels of a run in empty caches: side by side, and one after the other."""
    found: dict[str, Any] = {"problems": []}
    for case, (name, _) in enumerate(CASES[:2]):
        for threads in (cores().threads, 1):
            with tempfile.TemporaryDirectory() as cache:
                part = run_part(f"start-one:{case}:{threads}", TRITON_CACHE_DIR=cache)
            found["problems"] += filter(None, [part.pop("error", None)])
            found[f"{name}, {threads} threads"] = part
            report(found)


def start_one(case: int, threads: int) -> None:
    """Compile for one of CASES; report the kernels and the seconds."""
    report(compiled(*CASES[case], threads))
