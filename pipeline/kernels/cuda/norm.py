"""Layer normalization, one warp per row, in the order of docs/arithmetic.md.

Naive, for one row; `lanes` is the sum over 32 lanes:

    mean = lanes(x) / C
    f    = float32(1 / sqrt(float64(lanes((x - mean)^2)) / C + epsilon))
    y    = (((x - mean) * f) * weight) + bias
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gptbatch.pipeline.kernels.cuda.arithmetic import sum_lanes
from gptbatch.pipeline.kernels.cuda.launch import launch, wait_for_previous

# Wider rows are read three times: the time to compile grows with the cube of the pieces.
MAX_HELD_WIDTH = tl.constexpr(1024)


@triton.jit
def load_piece(x, c, C: tl.constexpr):
    """Load 32 elements in float32; 0 beyond C."""
    return tl.load(x + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def add_square(total, piece, mean, c, C: tl.constexpr):
    """Add the squares of a piece less the mean to 32 lanes."""
    centered = tl.where(c < C, piece - mean, 0.0)
    return total + centered * centered


@triton.jit
def store_piece(y, piece, mean, factor, weight, bias, c, C: tl.constexpr):
    """Write 32 elements of the result."""
    w, b = load_piece(weight, c, C), load_piece(bias, c, C)
    result = (((piece - mean) * factor) * w) + b
    tl.store(y + c, result.to(y.dtype.element_ty), mask=c < C)


@triton.jit
def factor_of(squares, EPSILON: tl.constexpr, C: tl.constexpr):
    """Return 1 / sqrt(variance + epsilon)."""
    return (1.0 / tl.sqrt(sum_lanes(squares).to(tl.float64) / C + EPSILON)).to(tl.float32)


@triton.jit
def norm_kernel(x, weight, bias, y, EPSILON: tl.constexpr, C: tl.constexpr):
    """Normalize x (M, C) into y (M, C): lane j adds the elements j mod 32."""
    wait_for_previous()
    lane = tl.arange(0, 32)
    x += tl.program_id(0).to(tl.int64) * C
    y += tl.program_id(0).to(tl.int64) * C
    total = tl.zeros((32,), tl.float32)
    squares = tl.zeros((32,), tl.float32)
    if C <= MAX_HELD_WIDTH:
        pieces: tl.tuple = ()
        for c0 in tl.static_range(0, C, 32):
            piece = load_piece(x, c0 + lane, C)
            pieces = pieces + (piece,)  # noqa: RUF005 - triton takes no * in a tuple
            total += piece
        mean = tl.div_rn(sum_lanes(total), C * 1.0)
        for i in tl.static_range(len(pieces)):
            squares = add_square(squares, pieces[i], mean, i * 32 + lane, C)
        factor = factor_of(squares, EPSILON, C)
        for i in tl.static_range(len(pieces)):
            store_piece(y, pieces[i], mean, factor, weight, bias, i * 32 + lane, C)
    else:
        for c0 in range(0, C, 32):
            total += load_piece(x, c0 + lane, C)
        mean = tl.div_rn(sum_lanes(total), C * 1.0)
        for c0 in range(0, C, 32):
            squares = add_square(squares, load_piece(x, c0 + lane, C), mean, c0 + lane, C)
        factor = factor_of(squares, EPSILON, C)
        for c0 in range(0, C, 32):
            piece = load_piece(x, c0 + lane, C)
            store_piece(y, piece, mean, factor, weight, bias, c0 + lane, C)


def norm(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, epsilon: float) -> None:
    """Normalize the rows of x (M, C) into y (M, C), both contiguous."""
    launch(
        norm_kernel,
        (len(x),),
        *(x, weight, bias, y, epsilon, x.shape[1]),
        num_warps=1,
        enable_fp_fusion=False,
    )


def norm_twin(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, epsilon: float) -> None:
    """Compute in torch what `norm` computes."""
    y.copy_(F.layer_norm(x.float(), (x.shape[1],), weight.float(), bias.float(), epsilon))
