"""Shapes, tiles, timing and reports of the sections.

With CUDA_CHECK_FAKE=1 the shapes are tiny, and all runs on a CPU; see fake.py.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.preflight import is_fake
from gptbatch.pipeline.kernels.cuda.linear import column_major
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS, Tile
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.model.config import GPTConfig

IS_FAKE = is_fake()
DEVICE = "cpu" if IS_FAKE else "cuda"
C, H, INNER, LAYERS, VOCAB, POSITIONS = (
    (32, 2, 64, 1, 300, 160) if IS_FAKE else (768, 12, 3072, 12, 50257, 1024)
)
CONFIG = GPTConfig(
    vocab_size=VOCAB, n_positions=POSITIONS, n_embd=C, n_inner=INNER, n_layer=LAYERS, n_head=H
)


# (N, K) of each linear of GPT-2 124M
SHAPES = {
    "qkv": (3 * C, C),
    "out": (C, C),
    "mlp_in": (INNER, C),
    "mlp_out": (C, INNER),
    "head": (VOCAB, C),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF_TILES = [
    Tile(64, 16, 64, 4, 4),
    Tile(64, 16, 128, 4, 4),
    Tile(64, 32, 64, 4, 4),
    Tile(64, 32, 128, 4, 4),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 64, 128, 4, 3),
    Tile(64, 128, 64, 4, 4),
    Tile(64, 128, 128, 4, 3),
    Tile(64, 128, 64, 8, 4),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 64, 128, 4, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
]
FLOAT_TILES = [
    Tile(32, 32, 32, 4, 3),
    Tile(32, 32, 32, 2, 3),
    Tile(32, 64, 16, 4, 3),
    Tile(32, 64, 32, 4, 3),
    Tile(64, 32, 16, 4, 3),
    Tile(64, 32, 32, 4, 3),
    Tile(64, 64, 16, 4, 3),
    Tile(64, 64, 32, 4, 3),
    Tile(64, 64, 32, 8, 3),
    Tile(64, 128, 16, 4, 3),
    Tile(64, 128, 16, 8, 3),
    Tile(128, 64, 16, 8, 3),
    Tile(128, 128, 16, 8, 3),
    Tile(128, 128, 16, 4, 3),
]
# Runs: dtype and cache.
CASES: tuple[tuple[str, CacheDtype], ...] = (
    ("bfloat16", "auto"),
    ("float32", "auto"),
    ("bfloat16", "int8"),
    ("float32", "int8"),
)
ROW_COUNTS = (16, 32) if IS_FAKE else (64, 256, 1024)


def tiles_of(dtype: str) -> list[Tile]:
    return FLOAT_TILES if dtype == "float32" else HALF_TILES


def head_tiles(dtype: str) -> list[Tile]:
    return list(dict.fromkeys(tile for tile in tiles_of(dtype) if tile.bn == MAX_COLUMNS))


def weight(columns: int, depth: int, dtype: str) -> Tensor:
    """Return random weights (N, K), laid out as a linear of this dtype wants them."""
    w = random(columns, depth, dtype=DTYPES[dtype], scale=0.02)
    return column_major(w) if dtype == "float32" else w


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def time_us(launches: Callable[[], object], count: int, replays: int = 20) -> float:
    """Return microseconds per launch: `launches` makes `count` of them, captured in a graph."""
    launches()
    if IS_FAKE:
        began = time.perf_counter()
        launches()
        return (time.perf_counter() - began) * 1e6 / count
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / count)
    return float(statistics.median(times))


def synchronize() -> None:
    """Wait for the device."""
    if not IS_FAKE:
        torch.cuda.synchronize()


def report(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def out_folder() -> Path:
    return Path(os.environ.get("CUDA_CHECK_OUT", "."))
