"""Compile the Triton kernels for GPUs that are not at hand, and look at the machine code.

The launchers of the package are called with tensors of the meta device, and a driver that only
compiles takes their launches. So the signatures, constants and options are those of a run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gptbatch.pipeline.kernels.cuda.advance import advance
from gptbatch.pipeline.kernels.cuda.attend import attend
from gptbatch.pipeline.kernels.cuda.embed import embed
from gptbatch.pipeline.kernels.cuda.linear import column_major, linear
from gptbatch.pipeline.kernels.cuda.norm import norm
from gptbatch.pipeline.kernels.cuda.sample import sample, scratch_sizes
from gptbatch.pipeline.kernels.cuda.state import HEADER
from gptbatch.pipeline.kernels.cuda.store import LayerCache, store
from gptbatch.pipeline.kernels.cuda.tiles import TABLES, Tile

INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "LDL", "STL")
# Divisions and square roots of float64 must round as IEEE 754 says.
# The last one is the first constant of the logarithm, in float64.
PTX = (
    *("fma.rn.f64", "sqrt.rn.f64", "div.rn.f64", "sqrt.approx", "div.full", "ex2.approx", ".ftz"),
    "0d3FE5555555555593",
)
ROWS, BLOCKS = 512, 100
C, H, D, V = 768, 12, 64, 50257


class Driver:
    """A driver of triton without a GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """Return the GPU to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Return a key of triton's cache of kernels."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Return no stream."""
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Any]]:
    """Compile launches inside the block instead of running them; collect the kernels."""
    kernels: list[Any] = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(Driver(capability))
    JITFunction.run = only_compile
    try:
        yield kernels
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(name: str, dtype: torch.dtype, *, int8: bool = False, tile: Tile | None = None) -> None:
    """Launch a kernel at the shapes of GPT-2 124M."""
    i32, i64 = torch.int32, torch.int64
    state, tables = new(ROWS, HEADER + 16, dtype=i64), new(ROWS, HEADER + 16, dtype=i64)[:, HEADER:]
    x, qkv = new(ROWS, C, dtype=dtype), new(ROWS, 3 * C, dtype=dtype)
    rows = (new(ROWS, dtype=i32), new(ROWS, dtype=i32))
    wide = new(C, dtype=dtype)
    cache = LayerCache(new(BLOCKS, 2, H, 64, D, dtype=torch.int8 if int8 else dtype))
    if int8:
        cache = LayerCache(cache.data, new(BLOCKS, 2, H, 64))
    if name == "embed":
        wte, wpe = new(V, C, dtype=dtype), new(1024, C, dtype=dtype)
        embed(state, new(3, 512, dtype=i64), 64, wte, wpe, x, *rows)
    elif name == "norm":
        norm(x, wide, wide, x, 1e-5)
    elif name in ("linear", "head"):
        w = new(V if name == "head" else C, C, dtype=dtype)
        w = column_major(w) if dtype == torch.float32 else w
        if name == "head":
            linear(x, w, None, None, new(ROWS, 50304)[:, :V], "none", new(ROWS, 393), tile=tile)
        else:
            linear(x, w, wide, x, x, "gelu_tanh", tile=tile)
    elif name == "store":
        store(qkv, cache, tables, *rows)
    elif name == "attend":
        attend(qkv, cache, tables, *rows, x, 0.125)
    elif name == "sample":
        small, large = scratch_sizes(393)
        scratch = (new(ROWS, small, dtype=i32), new(ROWS, large, dtype=i64))
        logits = new(ROWS, 50304)[:, :V]
        sample(logits, new(ROWS, 393), state, scratch, rows[0], full_vocab=True, top_p=True)
    else:
        advance(rows[0], state, new(1, dtype=i64), new(ROWS, 2, dtype=i64))


def tiles(dtype: torch.dtype) -> list[tuple[str, Tile]]:
    """Return every tile of the table, with the linear that it is for."""
    return [
        pair
        for _, wide, other, head in TABLES[dtype]
        for pair in (("linear", wide), ("linear", other), ("head", head))
    ]


def describe(binary: Any) -> dict[str, Any]:
    """Return counts of instructions, registers, and the memory of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run(
                [tools / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for option in ("-sass", "-res-usage")
        )
    # FFMA2 is two FFMA in one instruction.
    found = {word: len(re.findall(rf"\b{word}2?\b", sass)) for word in INSTRUCTIONS}
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert registers is not None, usage
    return {
        "kernel": binary.metadata.name,
        "registers": int(registers[1]),
        "stack_bytes": int(registers[2]),
        "shared_bytes": binary.metadata.shared,
        **found,
        **{text: binary.asm["ptx"].count(text) for text in PTX},
    }


def compiled(
    name: str, dtype: str, capability: int, *, int8: bool = False, tile: Tile | None = None
) -> list[dict[str, Any]]:
    """Return the description of each kernel that a launcher launches."""
    with compiling(capability) as kernels:
        launch(name, getattr(torch, dtype), int8=int8, tile=tile)
    return [{"call": f"{name} {dtype} {tile}", **describe(kernel)} for kernel in kernels]
