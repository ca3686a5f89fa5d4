"""Seconds to compile the Triton kernels of a model into an empty cache, without a GPU.

    python benchmarks/cuda_compile.py [--shape gpt2] [--dtype float32] [--cache-dtype auto]
                                      [--threads N]

Compiles for compute capability 9.0, side by side in N threads, as a run does before its self-test.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

# Read when triton is imported.
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton

from gptbatch.pipeline.bench.shapes import SHAPES, shape_config
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.compiling import compile_kernels
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.packing import pack
from tests.cuda_compile import Driver


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--cache-dtype", choices=["auto", "int8"], default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    model = GPT(shape_config(args.shape), backend=TRITON, cache_dtype=args.cache_dtype)
    model = model.eval().requires_grad_(False).to(getattr(torch, args.dtype))
    pack(model)
    triton.runtime.driver.set_active(Driver(90))
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        began = time.perf_counter()
        count = compile_kernels(model, args.threads)
        seconds = time.perf_counter() - began
    print(f"{count} kernels, {seconds:.1f} s, {args.threads} threads, triton {triton.__version__}")


if __name__ == "__main__":
    main()
