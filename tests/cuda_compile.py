"""Compile the Triton kernels for GPUs that are not at hand, and look at the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptbatch.pipeline.kernels.cuda.attend import attend_kernel
from gptbatch.pipeline.kernels.cuda.linear import Tile, linear_kernel, qkv_kernel
from gptbatch.pipeline.kernels.cuda.norm import add_norm_kernel, embed_kernel, norm_kernel
from gptbatch.pipeline.kernels.cuda.sample import sample_kernel

INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "FFMA", "LDL", "STL")
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


# As in the step: the length of a chain over K.
SEGMENT = {"float32": 256, "bfloat16": 768, "float16": 768}


def strides(dtype: str) -> tuple[str, str]:
    """Return the stride of the weights that is 1, and the other."""
    names = ("w_stride_n", "w_stride_k")
    return names if dtype == "float32" else (names[1], names[0])


def tools() -> Path:
    """Return the folder of cuobjdump, which the wheel of triton carries."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(
    kernel: Any, dtypes: dict[str, str], constants: dict[str, Any], capability: int, **options: Any
) -> dict[str, Any]:
    """Compile one kernel; pointers, and integers called stride, are multiples of 16.

    Args:
        kernel: The jitted function.
        dtypes: Type of each argument that is not a constant: "*bf16", "i32", "fp32".
        constants: Values of the constants.
        capability: 80, 90 or 100.
        **options: num_warps, num_stages.
    """
    names = kernel.arg_names
    signature = {name: dtypes.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, dtype in dtypes.items()
        if dtype.startswith("*") or name.endswith("stride") or name.startswith("w_stride")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    options = {"enable_fp_fusion": False, **options}
    binary = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        sass = subprocess.check_output([tools() / "cuobjdump", "-sass", file.name], text=True)
        usage = subprocess.check_output([tools() / "cuobjdump", "-res-usage", file.name], text=True)
    # FFMA2 is two FFMA in one instruction.
    found = {word: len(re.findall(rf"\b{word}2?\b", sass)) for word in INSTRUCTIONS}
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert registers is not None, usage
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(registers[2]),
        "shared_bytes": binary.metadata.shared,
        **found,
    }


def linear(dtype: str, tile: Tile, depth: int, capability: int) -> dict[str, Any]:
    name = NAMES[dtype]
    contiguous, stride = strides(dtype)
    return compiled(
        linear_kernel,
        {
            **dict.fromkeys(("x", "w", "bias", "residual", "y"), f"*{name}"),
            **dict.fromkeys(("N", "y_stride", stride), "i32"),
        },
        {
            "block_max": None,
            contiguous: 1,
            "K": depth,
            "SEGMENT": SEGMENT[dtype],
            "HAS_BIAS": True,
            "ACTIVATION": 1,
            "HAS_RESIDUAL": True,
            "HAS_MAX": False,
            "BM": tile.bm,
            "BN": tile.bn,
            "BK": tile.bk,
        },
        capability,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def qkv(dtype: str, tile: Tile, capability: int) -> dict[str, Any]:
    name = NAMES[dtype]
    contiguous, stride = strides(dtype)
    tables = ("block_tables", "seq_indices", "positions")
    return compiled(
        qkv_kernel,
        {
            **dict.fromkeys(("x", "w", "bias", "q", "cache"), f"*{name}"),
            **dict.fromkeys(tables, "*i32"),
            **dict.fromkeys(("table_size", stride), "i32"),
        },
        {
            contiguous: 1,
            "C": 768,
            "H": 12,
            "SEGMENT": SEGMENT[dtype],
            "BM": tile.bm,
            "BN": tile.bn,
            "BK": tile.bk,
        },
        capability,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def attend(dtype: str, dot: bool, warps: int, capability: int) -> dict[str, Any]:
    name = NAMES[dtype]
    return compiled(
        attend_kernel,
        {
            **dict.fromkeys(("q", "cache", "out"), f"*{name}"),
            **dict.fromkeys(("block_tables", "seq_indices", "positions"), "*i32"),
            "scale": "fp32",
            "table_size": "i32",
        },
        {"C": 768, "H": 12, "SIZE": 64, "DOT": dot},
        capability,
        num_warps=warps,
    )


def norm(dtype: str, capability: int) -> dict[str, Any]:
    return compiled(
        norm_kernel,
        {**dict.fromkeys(("x", "weight", "bias", "y"), f"*{NAMES[dtype]}"), "epsilon": "fp32"},
        {"C": 768},
        capability,
        num_warps=1,
    )


def add_norm(dtype: str, capability: int) -> dict[str, Any]:
    name = NAMES[dtype]
    return compiled(
        add_norm_kernel,
        {
            "partials": "*fp32",
            **dict.fromkeys(("linear_bias", "x", "weight", "bias", "y"), f"*{name}"),
            "epsilon": "fp32",
            "M": "i32",
        },
        {"C": 768, "SIZE": 1024, "SEGMENTS": 4},
        capability,
        num_warps=4,
    )


def embed(dtype: str, capability: int) -> dict[str, Any]:
    name = NAMES[dtype]
    return compiled(
        embed_kernel,
        {
            **dict.fromkeys(("wte", "wpe", "weight", "bias", "x", "y"), f"*{name}"),
            **dict.fromkeys(("tokens", "positions"), "*i32"),
            "epsilon": "fp32",
        },
        {"C": 768, "SIZE": 1024},
        capability,
        num_warps=4,
    )


def sample(warps: int, capability: int) -> dict[str, Any]:
    return compiled(
        sample_kernel,
        {
            "logits": "*fp32",
            "block_max": "*fp32",
            "positions": "*i32",
            "seeds": "*i64",
            "steps": "*i64",
            "temperatures": "*fp64",
            "top_k": "*i32",
            "blocks_scratch": "*i32",
            "kept_scratch": "*i32",
            "tokens": "*i32",
            "margins": "*fp64",
            **dict.fromkeys(("V", "stride", "BLOCKS"), "i32"),
        },
        {"BN": 128, "SIZE": 512, "GATHERED": 64, "KEPT": 128},
        capability,
        num_warps=warps,
    )
