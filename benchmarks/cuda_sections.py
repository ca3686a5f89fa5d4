"""The sections of cuda_check.py: `python -m benchmarks.cuda_sections SECTION`.

A section prints a JSON object after each finding, so that a section that is cut off keeps them.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.cuda_step import (
    HEAD_COLUMNS,
    MAX_SPREAD_ROWS,
    Decoder,
    Options,
    column_major,
    sample,
)
from gptbatch.pipeline.kernels.cuda.attend import attend_kernel, attend_twin
from gptbatch.pipeline.kernels.cuda.linear import (
    GELU_TANH,
    Tile,
    linear,
    partial_kernel,
)
from gptbatch.pipeline.kernels.cuda.norm import add_norm_kernel, norm_kernel, norm_twin
from gptbatch.pipeline.kernels.cuda.sample import MAX_BLOCKS, MAX_KEPT

C, H, INNER, LAYERS, VOCAB, POSITIONS = 768, 12, 3072, 12, 50257, 1024
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
# Tiles whose bits are compared at other K: smaller ones too, which run on mma.sync
BITS_HALF_TILES = [
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
# Good enough to begin with; `linear-times` writes the best of its run to tiles.json.
START_TILES = {
    "bfloat16": {name: Tile(64, 32, 128, 4, 4) for name in SHAPES},
    "float32": {name: Tile(32, 64, 16, 4, 3) for name in SHAPES},
}
ROW_COUNTS = (64, 256, 1024)
# Chains over K; bits depend on them.
SEGMENTS = {"bfloat16": 768, "float32": 256}


def tiles_of(dtype: str) -> list[Tile]:
    return FLOAT_TILES if dtype == "float32" else HALF_TILES


def head_tile(tile: Tile) -> Tile:
    """Return the tile with BN columns per block maximum, as the head needs it."""
    return replace(tile, bn=HEAD_COLUMNS)


def head_tiles(dtype: str) -> list[Tile]:
    return list(dict.fromkeys(tile for tile in tiles_of(dtype) if tile.bn == HEAD_COLUMNS))


def weight(columns: int, depth: int, dtype: str) -> Tensor:
    """Return random weights (N, K), laid out as a linear of this dtype wants them."""
    w = random(columns, depth, dtype=DTYPES[dtype], scale=0.02)
    return column_major(w) if dtype == "float32" else w


def bits_weight(w: Tensor) -> Tensor:
    return column_major(w) if w.dtype == torch.float32 else w


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def time_us(launches: Callable[[], object], count: int, replays: int = 20) -> float:
    """Return microseconds per launch: `launches` makes `count` of them, captured in a graph."""
    launches()
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


def report(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


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


def run_linear(
    name: str, x: Tensor, w: Tensor, tile: Tile, segment: int | None = None
) -> Callable[[], None]:
    """Return a launch of a linear of the model as it is used there."""
    rows, columns = len(x), len(w)
    y_dtype = torch.float32 if name == "head" else x.dtype
    padded = -(-columns // HEAD_COLUMNS) * HEAD_COLUMNS
    y = torch.empty(rows, padded, device="cuda", dtype=y_dtype)[:, :columns]
    bias = None if name == "head" else random(columns, dtype=x.dtype)
    residual = y if name in ("out", "mlp_out") else None
    block_max = None
    if name == "head":
        block_max = torch.empty(rows, triton.cdiv(columns, HEAD_COLUMNS), device="cuda")
    activation = GELU_TANH if name == "mlp_in" else 0

    def launch() -> None:
        linear(
            x,
            w,
            bias,
            residual,
            y,
            tile=tile,
            activation=activation,
            segment=segment,
            block_max=block_max,
        )

    return launch


def compile_some(index: int, count: int) -> None:
    """Run one of `count` shares of all linears once, so that later sections find them compiled."""
    failures = {}
    for dtype, name, tile in list(times_jobs())[index::count]:
        columns, depth = SHAPES[name]
        x = random(tile.bm, depth, dtype=DTYPES[dtype])
        try:
            run_linear(name, x, weight(columns, depth, dtype), tile, SEGMENTS[dtype])()
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
            failures[f"{dtype} {name} {tile}"] = str(error)[:200]
    for dtype, depth, tile in list(bits_jobs())[index::count]:
        x = random(tile.bm, depth, dtype=DTYPES[dtype])
        w = bits_weight(random(BITS_COLUMNS, depth, dtype=DTYPES[dtype]))
        try:
            linear(x, w, None, None, torch.empty(tile.bm, BITS_COLUMNS, device="cuda"), tile=tile)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
            failures[f"{dtype} {depth} {tile}"] = str(error)[:200]
    report(failures)


def compile_all() -> None:
    """Compile in parallel processes; report the wall time and failures."""
    started = time.monotonic()
    count = max(1, min(14, (os.cpu_count() or 2) - 2))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cuda_sections", f"compile-{index}-{count}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    failures: dict[str, str] = {}
    for child in children:
        lines = child.communicate()[0].splitlines()
        failures.update(json.loads(lines[-1]) if lines else {"child": f"exit {child.returncode}"})
    report(
        {
            "linears": len(list(times_jobs())) + len(list(bits_jobs())),
            "processes": count,
            "seconds": round(time.monotonic() - started, 1),
            "failures": failures,
        }
    )


def fma_chain(x: Tensor, w: Tensor) -> Tensor:
    """One float32 fma chain over k, by float64: the product is exact, the sum is rounded twice."""
    total = torch.zeros(len(x), len(w), device=x.device)
    for k in range(x.shape[1]):
        product = x[:, k, None].double() * w[None, :, k].double()
        total = (product + total.double()).float()
    return total


def linear_bits() -> None:
    """Compare the bits of linears over tiles and row counts; float32 also with a chain of fma."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"compared": 0, "different": []}
    for dtype in DTYPES:
        for depth in BITS_DEPTHS:
            x, w = (random(1024, depth, dtype=DTYPES[dtype]) for _ in range(2))
            w = bits_weight(w[:BITS_COLUMNS].contiguous())
            expected: Tensor | None = None
            for tile in BITS_FLOAT_TILES if dtype == "float32" else BITS_HALF_TILES:
                for rows in (1024, tile.bm, 2 * tile.bm, 3 * tile.bm):
                    y = torch.full((rows, BITS_COLUMNS), float("nan"), device="cuda")
                    linear(x[:rows], w, None, None, y, tile=tile)
                    if expected is None:
                        expected = y
                        if dtype == "float32":
                            chain = fma_chain(x[:64], w[:64])
                            unequal = (y[:64, :64] != chain).sum().item()
                            found[f"chain of fma, K {depth}: unequal of 4096"] = unequal
                    found["compared"] += 1
                    if not torch.equal(y, expected[:rows]):
                        share = (y != expected[:rows]).float().mean().item()
                        found["different"].append([dtype, depth, asdict(tile), rows, share])
            report(found)
    # Shuffled rows, and rows beside others.
    order = torch.randperm(1024, device="cuda")
    for dtype in DTYPES:
        tile = BITS_FLOAT_TILES[1] if dtype == "float32" else BITS_HALF_TILES[0]
        x, w = (random(1024, 768, dtype=DTYPES[dtype]) for _ in range(2))
        w = bits_weight(w[:BITS_COLUMNS].contiguous())
        ys = [torch.empty(1024, BITS_COLUMNS, device="cuda") for _ in range(2)]
        linear(x, w, None, None, ys[0], tile=tile)
        linear(x[order].contiguous(), w, None, None, ys[1], tile=tile)
        found[f"shuffled rows equal, {dtype}"] = torch.equal(ys[0][order], ys[1])
    found["different"] = found["different"][:20]
    report(found)


def linear_times() -> None:
    """Microseconds of each linear by tile and rows; weights come from memory, as in a step."""
    best: dict[str, dict[str, Any]] = {}
    table: dict[str, float] = {}
    for dtype in ("bfloat16", "float32"):
        for rows in (64, 256, 1024):
            for name, (columns, depth) in SHAPES.items():
                x = random(rows, depth, dtype=DTYPES[dtype])
                copies = 1 if name == "head" else LAYERS
                weights = [weight(columns, depth, dtype) for _ in range(copies)]
                for tile in head_tiles(dtype) if name == "head" else tiles_of(dtype):
                    if rows % tile.bm:
                        continue
                    calls = [run_linear(name, x, w, tile, SEGMENTS[dtype]) for w in weights]
                    key = f"{dtype} {rows} {name} {list(asdict(tile).values())}"
                    note(table, best, key, functools.partial(run_all, calls), copies)
                    if name in ("out", "mlp_out") and depth > SEGMENTS[dtype] and rows <= 256:
                        spread = run_spread(x, weights, tile, SEGMENTS[dtype])
                        note(table, best, f"{key} spread", spread, copies)
            report({"best": best})
    write_tiles(best)
    (out_folder() / "linear_times.json").write_text(json.dumps(table, indent=0))


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
    """Time a linear, and keep it where it is the best of its dtype, rows, name and way."""
    try:
        us = round(time_us(launches, copies, 10), 2)
    except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
        print(key, error)
        return
    table[key] = us
    dtype, rows, name, *_ = key.split()
    tile = json.loads(key[key.index("[") : key.index("]") + 1])
    if key.endswith("spread"):
        name += "_spread"
    group = best.setdefault(dtype, {}).setdefault(rows, {})
    if name not in group or us < group[name]["us"]:
        columns, depth = SHAPES[name.removesuffix("_spread")]
        flops = 2 * int(rows) * columns * depth
        size = 4 if dtype == "float32" else 2
        group[name] = {
            "tile": tile,
            "us": us,
            "tflops": round(flops / us / 1e6, 1),
            "weights_gb_s": round(columns * depth * size / us / 1e3),
        }


def run_spread(x: Tensor, weights: list[Tensor], tile: Tile, segment: int) -> Callable[[], None]:
    """Return launches of the linears with their segments of K side by side, without the norms."""
    rows, depth = x.shape
    columns, segments = len(weights[0]), depth // segment
    partials = torch.empty(segments, rows, columns, device="cuda")
    grid = (rows // tile.bm, triton.cdiv(columns, tile.bn), segments)

    def launches() -> None:
        for w in weights:
            partial_kernel[grid](
                x, w, partials, rows, columns, *w.stride(), depth, segment, **tile.options
            )

    return launches


def out_folder() -> Path:
    return Path(os.environ.get("CUDA_CHECK_OUT", "."))


def write_tiles(best: dict[str, dict[str, Any]]) -> None:
    (out_folder() / "tiles.json").write_text(json.dumps(best))


def read_tiles(dtype: str, rows: int) -> dict[str, Tile]:
    """Return the best tiles of `linear-times` for this many rows, or those to begin with."""
    start = dict(START_TILES[dtype])
    start["head"] = head_tiles(dtype)[0]
    try:
        best = json.loads((out_folder() / "tiles.json").read_text())[dtype]
    except (OSError, KeyError):
        return start
    fitting = [count for count in map(int, best) if count <= rows]
    group = best[str(max(fitting))] if fitting else {}
    tiles = {**start, **{name: Tile(*found["tile"]) for name, found in group.items()}}
    if rows <= MAX_SPREAD_ROWS:
        for name in ("out", "mlp_out"):
            tiles[name] = tiles.get(f"{name}_spread", tiles[name])
    return tiles


def options_for(dtype: str, rows: int, **changes: Any) -> Options:
    is_float = dtype == "float32"
    options = Options(
        tiles=read_tiles(dtype, rows),
        segment=SEGMENTS[dtype],
        spread=True,
        dot=is_float,
        attend_warps=2 if is_float else 1,
    )
    return replace(options, **changes)


def paged_case(
    rows: int, context: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return q, cache, block_tables, seq_indices and positions; unused places hold NaN."""
    per_row = -(-context // 64)
    blocks = torch.randperm(rows * per_row, device="cuda").view(rows, per_row).int()
    cache = random(rows * per_row, 2, H, 64, C // H, dtype=dtype)
    positions = torch.full((rows,), context - 1, device="cuda", dtype=torch.int32)
    last = blocks[:, -1].long()
    cache[last, :, :, (context - 1) % 64 + 1 :] = float("nan")
    seq_indices = torch.arange(rows, device="cuda", dtype=torch.int32)
    return random(rows, C, dtype=dtype), cache, blocks, seq_indices, positions


def run_attend(case: tuple[Tensor, ...], out: Tensor, *, dot: bool, warps: int) -> None:
    q, cache, tables, seq_indices, positions = case
    attend_kernel[len(q), H](
        q,
        cache,
        tables,
        seq_indices,
        positions,
        out,
        0.125,
        tables.shape[1],
        C=C,
        H=H,
        SIZE=64,
        DOT=dot,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def norm_by_lanes(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Compute the norm by its specification, with fma by way of float64."""

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a.double() * b.double() + c.double()).float()

    def tree(lanes: Tensor) -> Tensor:
        while lanes.shape[1] > 1:
            low, high = lanes.chunk(2, dim=1)
            lanes = low + high
        return lanes

    slices = x.view(len(x), -1, 32)
    total = slices[:, 0]
    for i in range(1, slices.shape[1]):
        total = total + slices[:, i]
    mean = tree(total) / x.shape[1]
    total = torch.zeros_like(total)
    for i in range(slices.shape[1]):
        centered = slices[:, i] - mean
        total = fma(centered, centered, total)
    deviation = torch.sqrt(tree(total) / x.shape[1] + epsilon)
    return fma((x - mean) / deviation, weight.expand_as(x), bias.expand_as(x))


def kernels() -> None:
    """Compare each kernel with its twin, and the sampler with torch's."""
    from gptbatch.pipeline.engine.sampling import sample_tokens
    from gptbatch.pipeline.params.sampling_params import SamplingParams

    found: dict[str, Any] = {}
    torch.manual_seed(1)

    def difference(a: Tensor, b: Tensor) -> float:
        a, b = a.float().cpu(), b.float().cpu()
        return float((a - b).norm() / b.norm())

    for dtype in ("float32", "bfloat16"):
        x = random(64, C, dtype=DTYPES[dtype])
        weight, bias = random(C, dtype=x.dtype), random(C, dtype=x.dtype)
        y = torch.empty_like(x)
        norm_kernel[(64,)](x, weight, bias, y, 1e-5, C=C, num_warps=1, enable_fp_fusion=False)
        found[f"norm {dtype}"] = difference(y, norm_twin(x, weight, bias, 1e-5))
        if dtype == "float32":
            found["norm: equal to the specification"] = torch.equal(
                y, norm_by_lanes(x, weight, bias, 1e-5)
            )
        report(found)
        for context in (1, 64, 65, 1000):
            case = paged_case(4, context, x.dtype)
            clean = case[1].nan_to_num(0.0)
            q, cache, tables, seq_indices, positions = (
                tensor.cpu() for tensor in (case[0], clean, *case[2:])
            )
            twin = attend_twin(q, cache, tables, seq_indices, positions, 0.125)
            for dot in (False, True):
                for warps in (1, 4):
                    out = torch.full_like(case[0], float("nan"))
                    run_attend(case, out, dot=dot, warps=warps)
                    key = f"attend {dtype} context {context} dot {dot} warps {warps}"
                    found[key] = difference(out, twin)
            report(found)
        partials = torch.randn(3, 64, C, device="cuda")
        x, y = random(64, C, dtype=DTYPES[dtype]), random(64, C, dtype=DTYPES[dtype])
        total = ((partials[0] + partials[1]) + partials[2]) + bias.float() + x.float()
        add_norm_kernel[(64,)](
            partials,
            bias,
            x,
            weight,
            bias,
            y,
            1e-5,
            64,
            C=C,
            SIZE=1024,
            SEGMENTS=3,
            num_warps=4,
            enable_fp_fusion=False,
        )
        found[f"add_norm {dtype}"] = [
            torch.equal(x, total.to(x.dtype)),
            difference(y, norm_twin(x, weight, bias, 1e-5)),
        ]
        report(found)
        for name, (columns, depth) in (("mlp_in", (INNER, C)), ("head", (1000, C))):
            x, w = random(64, depth, dtype=DTYPES[dtype]), random(columns, depth, dtype=x.dtype)
            tile = head_tiles(dtype)[0] if name == "head" else START_TILES[dtype]["qkv"]
            y = torch.empty(64, columns, device="cuda")
            rows = 64 if tile.bm <= 64 else tile.bm
            linear(x[:rows], w, None, None, y, tile=tile)
            found[f"linear {dtype} {name}"] = difference(y, x.float() @ w.float().T)
        report(found)
    logits = torch.randn(64, VOCAB, device="cuda") * 3
    logits[0, :100] = 20.0  # 100 ties
    buffers: Any = SampleBuffers(logits)
    sample(buffers, 8)
    expected = sample_tokens(
        logits,
        [
            SamplingParams(seed=seed, temperature=0.8, top_k=40, max_new_tokens=9)
            for seed in range(64)
        ],
        [5] * 64,
    )
    tokens = buffers.sampled.tolist()
    found["sampled tokens equal"] = sum(
        token == sampled.token for token, sampled in zip(tokens, expected, strict=True)
    )
    report(found)


class SampleBuffers:
    """What `sample` reads of Buffers, for given logits."""

    def __init__(self, logits: Tensor) -> None:
        rows = len(logits)
        padded = torch.nn.functional.pad(
            logits, (0, -logits.shape[1] % HEAD_COLUMNS), value=float("-inf")
        )
        self.logits = logits
        self.block_max = padded.view(rows, -1, HEAD_COLUMNS).amax(dim=2)

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, device=logits.device, dtype=dtype)

        self.seeds = torch.arange(rows, device=logits.device)
        self.positions = new(rows, dtype=torch.int32)
        self.steps = new(rows, dtype=torch.int64) + 5
        self.temperatures = new(rows, dtype=torch.float64) + 0.8
        self.top_k = new(rows, dtype=torch.int32) + 40
        self.margins = new(rows, dtype=torch.float64) + float("inf")
        self.sampled = new(rows, dtype=torch.int32)
        self.blocks_scratch = new(rows, MAX_BLOCKS, dtype=torch.int32)
        self.kept_scratch = new(rows, MAX_KEPT, dtype=torch.int32)


def kernel_times() -> None:
    """Microseconds of attention, norm, sampling, with the floor of the bytes they move."""
    found: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        for rows in ROW_COUNTS:
            for context in (96, 160):
                cases = [paged_case(rows, context, DTYPES[dtype]) for _ in range(4)]
                out = torch.empty_like(cases[0][0])
                floor = rows * context * 2 * C * out.element_size() / 3e6
                for dot in (False, True):
                    for warps in (1, 2):

                        def attends(
                            cases: Any = cases, out: Tensor = out, dot: bool = dot, w: int = warps
                        ) -> None:
                            for case in cases:
                                run_attend(case, out, dot=dot, warps=w)

                        key = f"attend {dtype} {rows} rows, {context} tokens, dot {dot}, w{warps}"
                        found[key] = [round(time_us(attends, 4, 5), 2), round(floor, 2)]
            report(found)
            x = random(rows, C, dtype=DTYPES[dtype])
            w, b, y = random(C, dtype=x.dtype), random(C, dtype=x.dtype), x.clone()

            def norms(
                x: Tensor = x, w: Tensor = w, b: Tensor = b, y: Tensor = y, rows: int = rows
            ) -> None:
                for _ in range(10):
                    norm_kernel[(rows,)](x, w, b, y, 1e-5, C=C, num_warps=1, enable_fp_fusion=False)

            found[f"norm {dtype} {rows} rows"] = round(time_us(norms, 10, 5), 2)
            for segments in (1, 4, 12):
                partials = torch.randn(segments, rows, C, device="cuda")

                def adds(
                    partials: Tensor = partials,
                    x: Tensor = x,
                    w: Tensor = w,
                    b: Tensor = b,
                    y: Tensor = y,
                    rows: int = rows,
                    segments: int = segments,
                ) -> None:
                    for _ in range(10):
                        add_norm_kernel[(rows,)](
                            partials,
                            b,
                            x,
                            w,
                            b,
                            y,
                            1e-5,
                            rows,
                            C=C,
                            SIZE=1024,
                            SEGMENTS=segments,
                            num_warps=4,
                            enable_fp_fusion=False,
                        )

                key = f"add_norm {dtype} {rows} rows, {segments} segments"
                found[key] = round(time_us(adds, 10, 5), 2)
            report(found)
    for rows in ROW_COUNTS:
        buffers: Any = SampleBuffers(torch.randn(rows, VOCAB, device="cuda") * 3)
        for warps in (4, 8, 16):
            us = time_us(functools.partial(sample, buffers, warps), 1)
            found[f"sample {rows} rows w{warps}"] = round(us, 2)
    report(found)


def gpt2(dtype: torch.dtype) -> Any:
    """Return GPT-2 124M with random weights, plain, on the GPU."""
    from gptbatch.pipeline.kv_cache.spec import PADDED
    from gptbatch.pipeline.model.config import GPTConfig
    from gptbatch.pipeline.model.gpt import GPT
    from gptbatch.pipeline.model.linear import Linear

    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=C, n_layer=LAYERS, n_head=H, n_inner=INNER
    )
    model = GPT(config, backend=PADDED).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.02)
    return model.to(device="cuda", dtype=dtype)


def step() -> None:
    """Run the decode step as a graph: logits against the model, bits over batches, tokens/s."""
    found: dict[str, Any] = {}
    prompts = torch.randint(VOCAB, (1024, 32), generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(1024)
    for dtype in ("float32", "bfloat16"):
        model = gpt2(DTYPES[dtype])
        options = options_for(dtype, 64)
        reference = model(prompts[:64].cuda())[:, -1]
        decoder = Decoder(model, 64, 160, options, shuffle=0)
        decoder.start(prompts[:64], 128, seeds[:64])
        decoder.run(1, graph=False)
        got = decoder.decode.logits
        found[f"{dtype} logits against the model"] = (
            (got.float() - reference.float()).norm() / reference.float().norm()
        ).item()
        report(found)
        rings: dict[str, tuple[Tensor, Tensor]] = {}
        order = torch.randperm(1024, generator=torch.Generator().manual_seed(3))
        for label, rows, chunk, graph in (
            ("64 rows", 64, 2048, True),
            ("64 rows, eager, segments in turn, chunks of 256", 64, 256, False),
            ("256 rows", 256, 2048, True),
            ("1024 rows", 1024, 2048, True),
            ("1024 rows shuffled, chunks of 1024", 1024, 1024, True),
        ):
            shuffled = "shuffled" in label
            chosen = order if shuffled else torch.arange(rows)
            options = options_for(dtype, rows, spread="in turn" not in label)
            decoder = Decoder(model, rows, 160, options, shuffle=rows)
            if graph:
                decoder.capture()
            seconds = []
            for repeat in range(3 if graph else 1):
                torch.cuda.synchronize()
                started = time.monotonic()
                decoder.start(prompts[chosen], 128, seeds[chosen], chunk)
                torch.cuda.synchronize()
                prefilled = time.monotonic()
                decoder.run(128, graph=graph)
                torch.cuda.synchronize()
                seconds.append((time.monotonic() - started, time.monotonic() - prefilled))
                del repeat
            total, decode = min(seconds)
            found[f"{dtype} {label}"] = {
                "tokens_per_s": round(rows * 128 / total),
                "decode_tokens_per_s": round(rows * 128 / decode),
                "step_us": round(decode / 128 * 1e6),
            }
            back = torch.argsort(chosen)
            rings[label] = (
                decoder.decode.ring[:, :128].cpu()[back],
                decoder.decode.margins.cpu()[back],
            )
            report(found)
            if graph and not shuffled:
                found[f"{dtype} {label}"]["kernels_us"] = profile(decoder, prompts, seeds)
            report(found)
            del decoder
            torch.cuda.empty_cache()
        expected_tokens, expected_margins = rings["1024 rows"]
        for label, (tokens, margins) in rings.items():
            found[f"{dtype} {label}: equal bits"] = [
                torch.equal(tokens, expected_tokens[: len(tokens)]),
                torch.equal(margins, expected_margins[: len(tokens)]),
                round((tokens == expected_tokens[: len(tokens)]).float().mean().item(), 4),
                int((tokens < 0).sum()),
            ]
        report(found)
        del model
        torch.cuda.empty_cache()


def profile(decoder: Decoder, prompts: Tensor, seeds: Tensor) -> dict[str, float]:
    """Return microseconds of a step by kernel, with half of the tokens generated."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    decoder.start(prompts[: decoder.rows], 128, seeds[: decoder.rows])
    decoder.run(64)
    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        decoder.run(4)
        torch.cuda.synchronize()
    return {
        event.key: round(event.device_time_total / 4, 1)
        for event in profiler.key_averages()
        if event.device_time_total > 0
    }


def transformers_rates() -> None:
    """Measure new tokens/s of transformers: generate, and generate_batch where it runs."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    found: dict[str, Any] = {}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    settings = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 40,
        "max_new_tokens": 128,
        "min_new_tokens": 128,
        "pad_token_id": 0,
    }
    for dtype, rows in (
        ("bfloat16", 64),
        ("float32", 64),
        ("bfloat16", 256),
        ("bfloat16", 1024),
        ("float32", 1024),
    ):
        model = model.to(device="cuda", dtype=DTYPES[dtype])
        idx = torch.randint(VOCAB, (rows, 32), device="cuda")
        try:
            times = []
            for repeat in range(3 if rows == 64 else 2):
                started = time.monotonic()
                with torch.inference_mode():
                    out = model.generate(
                        idx,
                        attention_mask=torch.ones_like(idx),
                        **{**settings, "eos_token_id": None},
                    )
                torch.cuda.synchronize()
                times.append(time.monotonic() - started)
                del repeat
            assert out.shape == (rows, 160)
            found[f"generate {dtype} {rows}"] = round(rows * 128 / min(times))
        except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
            found[f"generate {dtype} {rows}"] = str(error)[:200]
        report(found)
    for dtype, rows in (("bfloat16", 64), ("bfloat16", 1024)):
        try:
            batch = GPT2LMHeadModel(GPT2Config()).eval()
            batch = batch.to(device="cuda", dtype=DTYPES[dtype])
            inputs = torch.randint(VOCAB, (rows, 32)).tolist()
            times = []
            for _ in range(2):
                started = time.monotonic()
                with torch.inference_mode():
                    outputs = batch.generate_batch(
                        inputs=inputs,
                        generation_config=GenerationConfig(eos_token_id=-1, **settings),
                    )
                times.append(time.monotonic() - started)
            new = sum(len(output.generated_tokens) for output in outputs.values())
            found[f"generate_batch {dtype} {rows}"] = [round(new / min(times)), new]
        except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
            found[f"generate_batch {dtype} {rows}"] = f"{type(error).__name__}: {error}"[:300]
        report(found)


# The files with tests marked cuda, without those that need packages that a GPU machine may lack.
CUDA_TESTS = [f"tests/test_{name}.py" for name in ("sampling", "invariance", "model", "engine")]


def tests() -> None:
    """Run the tests marked cuda."""
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "cuda",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:benchmark",
            *CUDA_TESTS,
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    print(child.stdout[-6000:], child.stderr[-2000:])
    lines = child.stdout.strip().splitlines()
    report({"rc": child.returncode, "last_line": lines[-1] if lines else ""})


def main() -> None:
    section = sys.argv[1]
    torch.backends.cuda.matmul.allow_tf32 = False
    if section.startswith("compile-"):
        _, index, count = section.split("-")
        compile_some(int(index), int(count))
        return
    {
        "machine": machine,
        "compile": compile_all,
        "graph-nodes": graph_nodes,
        "kernels": kernels,
        "linear-bits": linear_bits,
        "linear-times": linear_times,
        "kernel-times": kernel_times,
        "step": step,
        "transformers": transformers_rates,
        "tests": tests,
    }[section]()


if __name__ == "__main__":
    main()
