"""Compile the Triton kernels for GPUs that are not at hand, and look at the machine code.

The launchers of the package are called with tensors of the meta device, and a driver that only
compiles takes their launches. So the signatures, constants and options are those of a run.
"""

from __future__ import annotations

import contextvars
import io
import itertools
import logging
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gptbatch.pipeline.kernels.cuda import launch as launch_module
from gptbatch.pipeline.kernels.cuda.adjust import adjust
from gptbatch.pipeline.kernels.cuda.adjustments import AdjustmentLayout, Adjustments
from gptbatch.pipeline.kernels.cuda.advance import advance
from gptbatch.pipeline.kernels.cuda.attend import attend
from gptbatch.pipeline.kernels.cuda.embed import embed
from gptbatch.pipeline.kernels.cuda.kernels import TRITON as KERNELS
from gptbatch.pipeline.kernels.cuda.linear import column_major, linear
from gptbatch.pipeline.kernels.cuda.logprobs import WIDTH, look_up, measure
from gptbatch.pipeline.kernels.cuda.norm import norm
from gptbatch.pipeline.kernels.cuda.sample import sample, scratch_sizes
from gptbatch.pipeline.kernels.cuda.state import HEADER
from gptbatch.pipeline.kernels.cuda.store import LayerCache, store
from gptbatch.pipeline.kernels.cuda.tiles import TABLES, Tile
from gptbatch.pipeline.kv_cache.device import DeviceKVCache
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.compiling import compile_kernels
from gptbatch.pipeline.model.compiling import logger as compiling_logger
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.device_step import CHUNK_SIZES, DeviceStep, StepShape
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.packing import pack
from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels

INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "LDL", "STL")
# Divisions and square roots of float64 must round as IEEE 754 says.
# The last one is the first constant of the logarithm, in float64.
PTX = (
    *(
        "fma.rn.f32",
        "div.rn.f32",
        "fma.rn.f64",
        "sqrt.rn.f64",
        "div.rn.f64",
        "sqrt.approx",
        "div.full",
        "ex2.approx",
        ".ftz",
    ),
    "0d3FE5555555555593",
)
ROWS, BLOCKS = 512, 100
C, H, D, V = 768, 12, 64, 50257
TINY = {"model_type": "gpt2", "vocab_size": 300, "n_layer": 1, "n_head": 2, "n_embd": 64}


class Driver:
    """A driver of triton without a GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self

    def launcher_cls(self, *_: Any) -> None:
        """Make no launcher."""

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Return the shared memory of a block."""
        return {"max_shared_mem": 2**20}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spills and the most threads."""
        return 1, 1, 0, 0, 1024

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


def launch(
    name: str,
    dtype: torch.dtype,
    *,
    int8: bool = False,
    tile: Tile | None = None,
    rows: int = ROWS,
    depth: int = C,
) -> None:
    """Launch a kernel at the shapes of GPT-2 124M; linears of other rows and depths, too."""
    i32, i64 = torch.int32, torch.int64
    state, tables = new(rows, HEADER + 16, dtype=i64), new(rows, HEADER + 16, dtype=i64)[:, HEADER:]
    x, qkv = new(rows, C, dtype=dtype), new(rows, 3 * C, dtype=dtype)
    indices = (new(rows, dtype=i32), new(rows, dtype=i32))
    wide = new(C, dtype=dtype)
    cache = LayerCache(new(BLOCKS, 2, H, 64, D, dtype=torch.int8 if int8 else dtype))
    if int8:
        cache = LayerCache(cache.data, new(BLOCKS, 2, H, 64))
    if name == "embed":
        wte, wpe = new(V, C, dtype=dtype), new(1024, C, dtype=dtype)
        embed(state, new(3, 512, dtype=i64), 64, wte, wpe, x, *indices)
    elif name == "norm":
        norm(x, wide, wide, x, 1e-5)
    elif name in ("linear", "head"):
        w = new(V if name == "head" else C, depth, dtype=dtype)
        w = column_major(w) if dtype == torch.float32 else w
        if name == "head":
            linear(x, w, None, None, new(rows, 50304)[:, :V], "none", new(rows, 393), tile=tile)
        else:
            linear(new(rows, depth, dtype=dtype), w, wide, x, x, "gelu_tanh", tile=tile)
    elif name == "store":
        store(qkv, cache, tables, *indices)
    elif name == "attend":
        attend(qkv, cache, tables, *indices, x, 0.125)
    elif name in ("adjust", "logprobs"):
        layout = AdjustmentLayout(rows=rows, n_positions=1024, vocab_size=V, n_token_bytes=300000)
        own = Adjustments(layout, torch.device("meta"))
        logits, found = new(rows, 50304)[:, :V], new(rows, WIDTH, dtype=i64)
        if name == "adjust":
            adjust(logits, new(rows, 393), state, own)
        else:
            measure(logits, new(rows, 393), state, found)
            look_up(logits, indices[0], state, own, found)
            look_up(logits, indices[0], state, None, found)
    elif name == "sample":
        small, large = scratch_sizes(393)
        scratch = (new(rows, small, dtype=i32), new(rows, large, dtype=i64))
        logits = new(rows, 50304)[:, :V]
        sample(logits, new(rows, 393), state, scratch, indices[0], full_vocab=True, top_p=True)
    else:
        advance(indices[0], state, new(1, dtype=i64), new(rows, 2, dtype=i64))


def tiles(dtype: torch.dtype) -> list[tuple[str, Tile]]:
    """Return every tile of the table, with the linear that it is for."""
    return [
        pair
        for _, wide, other, head in TABLES[dtype]
        for pair in (("linear", wide), ("linear", other), ("head", head))
    ]


def waits_first(ptx: str) -> bool | None:
    """Return whether a kernel waits for the one before it, before its memory; None: never."""
    accesses = re.findall(r"griddepcontrol\.\w+|(?:ld|st|red|atom|cp\.async)[\w.]*\.global", ptx)
    waits = [access for access in accesses if access.startswith("griddepcontrol")]
    return accesses[0] == "griddepcontrol.wait" and len(waits) == 1 if waits else None


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
        "is_dependent": binary.metadata.launch_pdl,
        "waits_first": waits_first(binary.asm["ptx"]),
        **found,
        **{text: binary.asm["ptx"].count(text) for text in PTX},
    }


def compiled(
    name: str, dtype: str, capability: int, *, dependent: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Return the description of each kernel that a launcher launches; options as `launch`.

    Kernels of one process are all dependent, or none.
    """
    launch_module.DEPENDENT_LAUNCH = tl.constexpr(dependent)
    with compiling(capability) as kernels:
        launch(name, getattr(torch, dtype), **options)
    return [{"call": f"{name} {dtype} {options}", **describe(kernel)} for kernel in kernels]


def hashes(name: str, dtype: str, capability: int, rows: Sequence[int]) -> list[list[str]]:
    """Return the hashes of the kernels that a launcher launches for each number of rows."""
    found = []
    for count in rows:
        with compiling(capability) as kernels:
            launch(name, getattr(torch, dtype), rows=count)
        found.append([kernel.hash for kernel in kernels])
    return found


def compiled_by_a_run(capability: int, dtype: str, cache_dtype: CacheDtype) -> dict[str, Any]:
    """Compile the kernels of a small model as a run does; then count what it launches beside them.

    The launches are those of the steps of the engine, with prompts, and of the self-test.
    """
    with torch.device("cpu"):
        model = GPT(parse_config(TINY, "tiny"), backend=TRITON, cache_dtype=cache_dtype)
    model = model.eval().requires_grad_(False).to(getattr(torch, dtype))
    pack(model)
    triton.runtime.driver.set_active(Driver(capability))
    handler = logging.StreamHandler(said := io.StringIO())
    compiling_logger.addHandler(handler)
    compiling_logger.setLevel(logging.INFO)
    missing: list[str] = []
    cache = DeviceKVCache(model.cache_spec, 1024, capacity=1)
    step = DeviceStep(model, cache, KERNELS, eos_token_ids=(1, 2), n_token_bytes=300)
    step.adjustments = Adjustments(step.adjustment_layout, torch.device("meta"))

    def launch_all() -> None:
        launch_module._only_compiles.set(True)
        triton.knobs.compilation.listener = lambda **facts: missing.append(facts["src"].name)
        row_counts = (0, 16, 32, 64, 128, 256, 512, 1024)
        either = (False, True)
        for rows, chunk, full_vocab, top_p, adjusts, logprobs in itertools.product(
            row_counts, CHUNK_SIZES, either, either, either, either
        ):
            if rows + chunk:
                shape = StepShape(
                    decode_rows=rows,
                    chunk_rows=chunk,
                    full_vocab=full_vocab,
                    top_p=top_p,
                    adjusts=adjusts,
                    logprobs=logprobs,
                )
                step.run(shape)
        select_batch_invariant_kernels(model)

    compile_kernels(model)
    contextvars.copy_context().run(launch_all)
    return {"said": said.getvalue(), "missing": missing}
