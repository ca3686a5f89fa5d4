"""Sections `compile`, `linear-bits` and `linear-times`: the Triton kernel of linears."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.cuda.common import (
    DEVICE,
    DTYPES,
    LAYERS,
    ROW_COUNTS,
    SHAPES,
    head_tiles,
    out_folder,
    random,
    report,
    tiles_of,
    time_us,
    weight,
)
from benchmarks.cuda.parts import Case, Found, run_cases
from gptbatch.pipeline.kernels.cuda.launch import compile_side_by_side
from gptbatch.pipeline.kernels.cuda.linear import column_major, linear
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS, Tile
from gptbatch.pipeline.system.machine import cores

# Tiles whose bits are compared at other K: smaller ones too, which run on mma.sync
BITS_HALF_TILES = [
    Tile(64, 16, 128, 4, 4),
    Tile(64, 32, 64, 4, 4),
    Tile(64, 64, 32, 4, 3),
    Tile(64, 64, 128, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 2),
    Tile(32, 32, 64, 4, 3),
    Tile(16, 64, 64, 4, 3),
]
BITS_FLOAT_TILES = [
    Tile(32, 32, 16, 4, 3),
    Tile(64, 64, 16, 4, 3),
    Tile(128, 64, 16, 8, 3),
    Tile(32, 64, 32, 4, 2),
]
BITS_DEPTHS = (768, 1024, 3072, 4096, 5120, 6400)
BITS_COLUMNS = 256
# The most seconds of a case of `linear-bits`.
LIMIT = 20


def bits_weight(w: Tensor) -> Tensor:
    return column_major(w) if w.dtype == torch.float32 else w


def bits_jobs() -> Iterator[tuple[str, int, Tile]]:
    for dtype in DTYPES:
        for depth in BITS_DEPTHS:
            for tile in BITS_FLOAT_TILES if dtype == "float32" else BITS_HALF_TILES:
                yield dtype, depth, tile


def times_jobs() -> Iterator[tuple[str, str, Tile]]:
    for dtype in ("bfloat16", "float32"):
        for name in SHAPES:
            for tile in head_tiles(dtype) if name == "head" else tiles_of(dtype):
                yield dtype, name, tile


def run_linear(name: str, x: Tensor, w: Tensor, tile: Tile) -> Callable[[], None]:
    """Return a launch of a linear of the model as it is used there."""
    rows, columns = len(x), len(w)
    y_dtype = torch.float32 if name == "head" else x.dtype
    padded = -(-columns // MAX_COLUMNS) * MAX_COLUMNS
    y = torch.empty(rows, padded, device=DEVICE, dtype=y_dtype)[:, :columns]
    bias = None if name == "head" else random(columns, dtype=x.dtype)
    residual = y if name in ("out", "mlp_out") else None
    block_max = None
    if name == "head":
        block_max = torch.empty(rows, triton.cdiv(columns, MAX_COLUMNS), device=DEVICE)
    activation = "gelu_tanh" if name == "mlp_in" else "none"

    def launch() -> None:
        linear(x, w, bias, residual, y, activation, block_max, tile=tile)

    return launch


def compile_all() -> None:
    """Compile side by side what the next sections launch; report the seconds and a failure."""
    began = time.monotonic()
    found: dict[str, Any] = {"linears": len(list(times_jobs())) + len(list(bits_jobs()))}

    def launches() -> None:
        for dtype, name, tile in times_jobs():
            columns, depth = SHAPES[name]
            x = random(tile.bm, depth, dtype=DTYPES[dtype])
            run_linear(name, x, weight(columns, depth, dtype), tile)()
        for dtype, depth, tile in bits_jobs():
            x = random(tile.bm, depth, dtype=DTYPES[dtype])
            w = bits_weight(random(BITS_COLUMNS, depth, dtype=DTYPES[dtype]))
            y = torch.empty(tile.bm, BITS_COLUMNS, device=DEVICE)
            linear(x, w, None, None, y, tile=tile)

    try:
        found["compiled"] = compile_side_by_side(launches, cores().threads)
    except Exception as error:  # noqa: BLE001 - it is reported, and the rest was compiled
        found["problems"] = [str(error)[:300]]
    report({**found, "seconds": round(time.monotonic() - began, 1)})


def fma_chain(x: Tensor, w: Tensor) -> Tensor:
    """One float32 fma chain over k, by float64: the product is exact, the sum is rounded twice."""
    total = torch.zeros(len(x), len(w), device=x.device)
    for k in range(x.shape[1]):
        product = x[:, k, None].double() * w[None, :, k].double()
        total = (product + total.double()).float()
    return total


def linear_bits(first: int = 0) -> None:
    """Compare the bits of linears over tiles and row counts; float32 also with a chain of fma."""
    cases: dict[str, Case] = {
        f"{dtype}, K {depth}": functools.partial(compare_tiles, dtype, depth)
        for dtype in DTYPES
        for depth in BITS_DEPTHS
    }
    cases |= {f"{dtype}, shuffled": functools.partial(compare_shuffled, dtype) for dtype in DTYPES}
    run_cases(cases, first, LIMIT)


def compare_tiles(dtype: str, depth: int, found: Found) -> None:
    """Compare all tiles at several row counts."""
    x, w = (random(1024, depth, dtype=DTYPES[dtype]) for _ in range(2))
    w = bits_weight(w[:BITS_COLUMNS].contiguous())
    expected: Tensor | None = None
    compared = 0
    different: list[str] = []
    for tile in BITS_FLOAT_TILES if dtype == "float32" else BITS_HALF_TILES:
        for rows in (1024, tile.bm, 2 * tile.bm, 3 * tile.bm):
            y = torch.full((rows, BITS_COLUMNS), float("nan"), device=DEVICE)
            linear(x[:rows], w, None, None, y, tile=tile)
            expected = y if expected is None else expected
            compared += 1
            if not torch.equal(y, expected[:rows]):
                share = (y != expected[:rows]).float().mean().item()
                different.append(f"{dtype}, K {depth}, {tile}, {rows} rows: {share:.1%} differ")
    found[f"{dtype}, K {depth}: products compared"] = compared
    found["problems"] += different[:20]
    if dtype == "float32":
        assert expected is not None
        # The chain rounds twice, so a few may differ.
        count = (expected[:64, :64] != fma_chain(x[:64], w[:64])).sum().item()
        found[f"chain of fma, K {depth}: of 4096 differ"] = count


def compare_shuffled(dtype: str, found: Found) -> None:
    """Compare shuffled rows: each row is beside others."""
    order = torch.randperm(1024, device=DEVICE)
    tile = BITS_FLOAT_TILES[1] if dtype == "float32" else BITS_HALF_TILES[0]
    x, w = (random(1024, 768, dtype=DTYPES[dtype]) for _ in range(2))
    w = bits_weight(w[:BITS_COLUMNS].contiguous())
    ys = [torch.empty(1024, BITS_COLUMNS, device=DEVICE) for _ in range(2)]
    linear(x, w, None, None, ys[0], tile=tile)
    linear(x[order].contiguous(), w, None, None, ys[1], tile=tile)
    found[f"shuffled rows equal, {dtype}"] = torch.equal(ys[0][order], ys[1])


def linear_times() -> None:
    """Microseconds of each linear by tile and rows; weights come from memory, as in a step."""
    best: dict[str, dict[str, Any]] = {}
    table: dict[str, float] = {}
    for dtype in ("bfloat16", "float32"):
        for rows in ROW_COUNTS:
            for name, (columns, depth) in SHAPES.items():
                x = random(rows, depth, dtype=DTYPES[dtype])
                copies = 1 if name == "head" else LAYERS
                weights = [weight(columns, depth, dtype) for _ in range(copies)]
                for tile in head_tiles(dtype) if name == "head" else tiles_of(dtype):
                    if rows % tile.bm:
                        continue
                    calls = [run_linear(name, x, w, tile) for w in weights]
                    key = f"{dtype} {rows} {name} {list(asdict(tile).values())}"
                    note(table, best, key, functools.partial(run_all, calls), copies)
                (out_folder() / "tiles.json").write_text(json.dumps(best))
                (out_folder() / "linear_times.json").write_text(json.dumps(table, indent=0))
                report({"best": best})


def run_all(calls: Iterable[Callable[[], object]]) -> None:
    """Make all calls, in order."""
    for call in calls:
        call()


def note(
    table: dict[str, float],
    best: dict[str, Any],
    key: str,
    launches: Callable[[], Any],
    copies: int,
) -> None:
    """Time a linear, and keep it where it is the best of its dtype, rows and name."""
    try:
        us = round(time_us(launches, copies, 10), 2)
    except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
        print(key, error)
        return
    table[key] = us
    dtype, rows, name, *_ = key.split()
    tile = json.loads(key[key.index("[") : key.index("]") + 1])
    group = best.setdefault(dtype, {}).setdefault(rows, {})
    if name not in group or us < group[name]["us"]:
        columns, depth = SHAPES[name]
        flops = 2 * int(rows) * columns * depth
        size = 4 if dtype == "float32" else 2
        group[name] = {
            "tile": tile,
            "us": us,
            "tflops": round(flops / us / 1e6, 1),
            "weights_gb_s": round(columns * depth * size / us / 1e3),
        }
