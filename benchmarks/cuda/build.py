"""Sections `build` and `start`: what is built and compiled before the first token."""

from __future__ import annotations

import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cuda.common import CASES, CONFIG, DEVICE, DTYPES, IS_FAKE, report
from benchmarks.cuda.parts import run_part
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.kernels.compiler import KernelError
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.compiling import compile_or_raise
from gptbatch.pipeline.system.machine import cores

# The last characters of a compiler's message.
MAX_MESSAGE = 1000


def build() -> None:
    """Fill the caches of the later sections: the C++ kernels, and the Triton kernels of all runs.

    The C++ compiler runs beside the Triton compiler.
    """
    found: dict[str, Any] = {"problems": []}
    with ThreadPoolExecutor(1) as executor:
        cpp = executor.submit(build_cpp)
        for name, cache_dtype in CASES:
            key = f"{name} cache {cache_dtype}"
            found[key] = compiled(name, cache_dtype, cores().threads)
            if "problem" in found[key]:
                found["problems"].append(key)
            report(found)
        found["C++"] = cpp.result()
    report(found)


def build_cpp() -> dict[str, Any]:
    """Build and load the C++ kernels; return the seconds, or why they cannot be built."""
    began = time.monotonic()
    try:
        load_kernels()
    except KernelError as error:
        return {"problem": str(error)[-MAX_MESSAGE:]}
    return {"seconds": round(time.monotonic() - began, 2)}


def compiled(name: str, cache_dtype: CacheDtype, threads: int) -> dict[str, Any]:
    """Compile for a model with one block, which launches all.

    Returns:
        The number of kernels that were not cached, or the problem, and the seconds.
    """
    began = time.monotonic()
    found: dict[str, Any] = {}
    try:
        model = random_model(
            replace(CONFIG, n_layer=1),
            dtype=DTYPES[name],
            device=torch.device(DEVICE),
            backend=TRITON,
            cache_dtype=cache_dtype,
        )
        began = time.monotonic()
        # The interpreter compiles nothing.
        found["kernels"] = 0 if IS_FAKE else compile_or_raise(model, threads)
    except Exception as error:  # noqa: BLE001 - it is reported, and the rest was compiled
        traceback.print_exc()
        found["problem"] = f"{type(error).__name__}: {error}"[-MAX_MESSAGE:]
    return {**found, "seconds": round(time.monotonic() - began, 2)}


def start() -> None:
    """Compile the kernels of a run in empty caches: side by side, and one after the other."""
    found: dict[str, Any] = {"problems": []}
    for case, (name, _) in enumerate(CASES[:2]):
        for threads in (cores().threads, 1):
            key = f"{name}, {threads} threads"
            with tempfile.TemporaryDirectory() as cache:
                for part in run_part(f"start-one:{case}:{threads}", TRITON_CACHE_DIR=cache):
                    found["problems"] += filter(None, [part.pop("error", None)])
                    found[key] = part
                    report(found)


def start_one(case: int, threads: int) -> None:
    """Compile for one of CASES; report the kernels and the seconds."""
    report(compiled(*CASES[case], threads))
