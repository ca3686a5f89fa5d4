"""Sections `kernels` and `kernel-times`: attention, norm and sampler against their twins."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.common import (
    DTYPES,
    INNER,
    ROW_COUNTS,
    START_TILES,
    VOCAB,
    C,
    H,
    head_tiles,
    random,
    report,
    time_us,
)
from benchmarks.cuda_step import (
    HEAD_COLUMNS,
    sample,
)
from gptbatch.pipeline.kernels.cuda.attend import attend_kernel, attend_twin
from gptbatch.pipeline.kernels.cuda.linear import (
    linear,
)
from gptbatch.pipeline.kernels.cuda.norm import add_norm_kernel, norm_kernel, norm_twin
from gptbatch.pipeline.kernels.cuda.sample import MAX_BLOCKS, MAX_KEPT


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
