"""Walks over the logits of one row in blocks of columns, and ordered integers of float32.

A walk visits only the blocks whose largest logit reaches a bound, 8 blocks at once. Bounds are
ordered integers, so that a bisection over all float32 takes at most 32 steps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptbatch.pipeline.kernels.cuda.arithmetic import log

LARGEST_INT32 = tl.constexpr(2147483647)
# `ordered_bits` of -inf.
LOWEST_BITS = tl.constexpr(-2139095041)


@triton.jit
def ordered_bits(x):
    """Map float32 to int32 so that larger numbers have larger integers; -0 equals 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def from_ordered_bits(bits):
    """Undo `ordered_bits`."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def can_be_sampled(maxima):
    """Return whether block maxima hold neither NaN nor inf, and not -inf alone."""
    largest = tl.max(maxima, axis=0)
    has_nan = tl.max((maxima != maxima).to(tl.int32), axis=0)
    return (has_nan == 0) & (largest < float("inf")) & (largest > float("-inf"))


@triton.jit
def value_of(bits):
    """Return the float64 of ordered bits."""
    return from_ordered_bits(bits).to(tl.float64)


@triton.jit
def halfway(low, high):
    """Return the integer between two, rounded down, without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def ceil_bits(x):
    """Return the ordered bits of the smallest float32 that is at least a float64."""
    nearest = x.to(tl.float32)
    bits = ordered_bits(nearest)
    return tl.where(nearest.to(tl.float64) < x, bits + 1, bits)


@triton.jit
def list_blocks(block_max, blocks, low, BLOCKS, SIZE: tl.constexpr):
    """List the blocks whose largest logit has ordered bits of at least `low`.

    Returns their number, and the largest logits of all blocks.
    All reads of the scratch memory of the row before this call are done after it.
    """
    b = tl.arange(0, SIZE)
    maxima = tl.load(block_max + b, mask=b < BLOCKS, other=float("-inf"))
    reaches = (ordered_bits(maxima) >= low) & (b < BLOCKS)
    place = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    tl.debug_barrier()
    tl.store(blocks + place, b, mask=reaches)
    tl.debug_barrier()
    return tl.sum(reaches.to(tl.int32)), maxima


@triton.jit
def columns_of(blocks, first, count, V, BN: tl.constexpr, TILE: tl.constexpr):
    """Return the columns of the listed blocks from `first` on, and which of them exist, (TILE,)."""
    i = tl.arange(0, TILE)
    place = first + i // BN
    column = tl.load(blocks + place, mask=place < count, other=0) * BN + i % BN
    return column, (place < count) & (column < V)


@triton.jit
def neighbours(
    logits, block_max, blocks, bound, V, BLOCKS, BN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return the largest logit below the bound and the smallest from there on, in float64.

    They are -inf and inf where there is none.
    """
    count, maxima = list_blocks(block_max, blocks, bound, BLOCKS, SIZE)
    largest = tl.max(tl.where(ordered_bits(maxima) < bound, maxima, float("-inf")), axis=0)
    below = tl.full((TILE,), float("-inf"), tl.float32)
    above = -below
    for first in range(0, count, TILE // BN):
        column, is_column = columns_of(blocks, first, count, V, BN, TILE)
        z = tl.load(logits + column, mask=is_column, other=float("-inf"))
        is_below = ordered_bits(z) < bound
        below = tl.maximum(below, tl.where(is_below, z, float("-inf")))
        above = tl.minimum(above, tl.where(is_below | (is_column == 0), float("inf"), z))
    largest = tl.maximum(largest, tl.max(below, axis=0))
    return largest.to(tl.float64), tl.min(above, axis=0).to(tl.float64)


@triton.jit
def largest_besides(
    logits, block_max, token, V, BLOCKS, BN: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Return the largest logit of all tokens but one."""
    b = tl.arange(0, SIZE)
    maxima = tl.load(block_max + b, mask=b < BLOCKS, other=float("-inf"))
    column = token // BN * BN + tl.arange(0, BN)
    beside = tl.load(logits + column, mask=column < V, other=float("-inf"))
    return tl.maximum(
        tl.max(tl.where(b == token // BN, float("-inf"), maxima), axis=0),
        tl.max(tl.where(column == token, float("-inf"), beside), axis=0),
    )


@triton.jit
def gumbel(seed, step, token):
    """Noise version 1 of the tokens, in float64; see `engine/noise.py`."""
    pair = (token >> 1).to(tl.uint32)
    zero = pair * 0
    w0, w1, w2, w3 = tl.philox(seed, pair, zero + step.to(tl.uint32), zero, zero)
    is_odd = (token & 1) == 1
    high = tl.where(is_odd, w2, w0).to(tl.uint64)
    low = tl.where(is_odd, w3, w1).to(tl.uint64)
    n = (high << 20) | (low >> 12)
    uniform = (n.to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -log(-log(uniform))
