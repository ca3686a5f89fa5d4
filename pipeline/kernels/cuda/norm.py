"""Layer normalization: alone, after the sum of a linear's segments, and after the embedding.

One program per row. The two sums of a row run over 32 logical lanes (c mod 32), each one chain over
c, then over the lanes by `tl.sum`. For one warp triton should add lanes i and i + 16 first, and so
on. `make cuda-check` compares the result with this tree; it has not run on a GPU since the kernel
took this form.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


@triton.jit
def norm_row(x, weight, bias, y, epsilon, C: tl.constexpr):
    """Normalize the row x (C,) into y (C,): (x - mean) / sqrt(variance + epsilon) * w + b."""
    lane = tl.arange(0, 32)
    total = tl.zeros((32,), tl.float32)
    values: tl.tuple = ()
    for c0 in tl.static_range(0, C, 32):
        value = tl.load(x + c0 + lane, mask=c0 + lane < C, other=0.0).to(tl.float32)
        values = values + (value,)  # noqa: RUF005 - triton takes no * in a tuple
        total += value
    mean = tl.div_rn(tl.sum(total, axis=0), C * 1.0)
    total = tl.zeros((32,), tl.float32)
    for i in tl.static_range(len(values)):
        centered = tl.where(i * 32 + lane < C, values[i] - mean, 0.0)
        total = tl.fma(centered, centered, total)
    deviation = tl.sqrt_rn(tl.div_rn(tl.sum(total, axis=0), C * 1.0) + epsilon)
    for i in tl.static_range(len(values)):
        c = i * 32 + lane
        w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        result = tl.fma(tl.div_rn(values[i] - mean, deviation), w, b)
        tl.store(y + c, result.to(y.dtype.element_ty), mask=c < C)


@triton.jit
def norm_kernel(x, weight, bias, y, epsilon, C: tl.constexpr):
    """Normalize x (M, C) into y (M, C)."""
    row = tl.program_id(0)
    norm_row(x + row * C, weight, bias, y + row * C, epsilon, C)


@triton.jit
def add_norm_kernel(
    partials,
    linear_bias,
    x,
    weight,
    bias,
    y,
    epsilon,
    M,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Add partials (SEGMENTS, M, C) and linear_bias to x (M, C); normalize x into y (M, C).

    SIZE: C rounded up to a power of 2.
    """
    row = tl.program_id(0)
    c = tl.arange(0, SIZE)
    mask = c < C
    total = tl.zeros((SIZE,), tl.float32)
    for segment in tl.static_range(SEGMENTS):
        total += tl.load(partials + (segment * M + row) * C + c, mask=mask, other=0.0)
    total += tl.load(linear_bias + c, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(x + row * C + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + row * C + c, total.to(x.dtype.element_ty), mask=mask)
    # Other threads of the program read it back.
    tl.debug_barrier()
    norm_row(x + row * C, weight, bias, y + row * C, epsilon, C)


@triton.jit
def embed_kernel(
    tokens, positions, wte, wpe, weight, bias, x, y, epsilon, C: tl.constexpr, SIZE: tl.constexpr
):
    """Set x (M, C) to wte[tokens] + wpe[positions], y to norm(x); position -1 is read as 0."""
    row = tl.program_id(0)
    token = tl.load(tokens + row).to(tl.int64)
    position = tl.maximum(tl.load(positions + row), 0)
    c = tl.arange(0, SIZE)
    mask = c < C
    value = tl.load(wte + token * C + c, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(wpe + position * C + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + row * C + c, value.to(x.dtype.element_ty), mask=mask)
    # Other threads of the program read it back.
    tl.debug_barrier()
    norm_row(x + row * C, weight, bias, y + row * C, epsilon, C)


def norm_twin(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Compute in torch what `norm_kernel` computes, in float32."""
    return F.layer_norm(x.float(), (x.shape[1],), weight.float(), bias.float(), epsilon)
