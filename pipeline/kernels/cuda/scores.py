"""Gather tokens of one row by their logits, and score them: the best kept one, the nearest outside.

Tokens are gathered from the blocks whose largest logit reaches the range, and scored whenever the
buffer is full.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptbatch.pipeline.kernels.cuda.state import SEED, STEP, TEMPERATURE
from gptbatch.pipeline.kernels.cuda.tokens import (
    LARGEST_INT32,
    columns_of,
    gumbel,
    list_blocks,
    ordered_bits,
)


@triton.jit
def gather(logits, blocks, buffer, filled, first, count, low, high, V,
           BN: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Append the tokens with ordered bits of low to below high of the next blocks to the buffer."""
    column, is_column = columns_of(blocks, first, count, V, BN, TILE)
    bits = ordered_bits(tl.load(logits + column, mask=is_column, other=float("-inf")))
    is_found = is_column & (bits >= low) & (bits < high)
    place = filled + tl.cumsum(is_found.to(tl.int32), axis=0) - 1
    tl.store(buffer + place, column, mask=is_found)
    return filled + tl.sum(is_found.to(tl.int32), axis=0)


@triton.jit
def score(own, logits, buffer, first, filled, SCORES: tl.constexpr):
    """Return tokens of the buffer, their logits and scores; -1 and -inf beyond its end."""
    e = first + tl.arange(0, SCORES)
    token = tl.load(buffer + e, mask=e < filled, other=-1)
    logit = tl.load(logits + token, mask=e < filled, other=float("-inf")).to(tl.float64)
    # Loaded each time, to hold fewer registers.
    seed, step = tl.load(own + SEED), tl.load(own + STEP)
    temperature = tl.load(own + TEMPERATURE).to(tl.float64, bitcast=True)
    return token, logit, logit + temperature * gumbel(seed, step, token)


@triton.jit
def best_tokens(
    own, logits, block_max, blocks, buffer, low, high, V, BLOCKS,
    BN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Return the token with the largest score of those from low to below high, and two scores."""
    count = list_blocks(block_max, blocks, low, BLOCKS, SIZE)[0]
    best = tl.full((SCORES,), float("-inf"), tl.float64)
    second = best
    winner = tl.full((SCORES,), -1, tl.int32)
    filled = 0
    for first in range(0, count, TILE // BN):
        filled = gather(logits, blocks, buffer, filled, first, count, low, high, V, BN, TILE)
        if (filled > TILE) | (first + TILE // BN >= count):
            tl.debug_barrier()
            for at in range(0, filled, SCORES):
                token, _, scores = score(own, logits, buffer, at, filled, SCORES)
                is_better = scores > best
                second = tl.maximum(second, tl.where(is_better, best, scores))
                winner = tl.where(is_better, token, winner)
                best = tl.where(is_better, scores, best)
            tl.debug_barrier()
            filled = 0
    largest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == largest, winner, LARGEST_INT32), axis=0)
    return token, largest, tl.max(tl.where(winner == token, second, best), axis=0)


@triton.jit
def nearest_outside(
    own, logits, block_max, blocks, buffer, low, high, nucleus_from, best, base_cutoff, V, BLOCKS,
    BN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Return the least max(reach, best - score) of the tokens from low to below high.

    Those below `nucleus_from` need more: the least of them without the reach by top_p, and its
    logit, come apart.
    """
    count = list_blocks(block_max, blocks, low, BLOCKS, SIZE)[0]
    least = tl.full((SCORES,), float("inf"), tl.float64)
    least_left, logit_left = least, -least
    filled = 0
    for first in range(0, count, TILE // BN):
        filled = gather(logits, blocks, buffer, filled, first, count, low, high, V, BN, TILE)
        if (filled > TILE) | (first + TILE // BN >= count):
            tl.debug_barrier()
            for at in range(0, filled, SCORES):
                _, logit, scores = score(own, logits, buffer, at, filled, SCORES)
                # -inf beyond the end of the buffer.
                gap = tl.where(logit > float("-inf"), base_cutoff - logit, float("inf"))
                gap = tl.maximum(gap, best - scores)
                is_left = logit < nucleus_from
                least = tl.minimum(least, tl.where(is_left, float("inf"), gap))
                is_least = is_left & (gap < least_left)
                least_left = tl.where(is_least, gap, least_left)
                logit_left = tl.where(is_least, logit, logit_left)
            tl.debug_barrier()
            filled = 0
    left = tl.min(least_left, axis=0)
    logit_left = tl.max(tl.where(least_left == left, logit_left, float("-inf")), axis=0)
    return tl.min(least, axis=0), left, logit_left
