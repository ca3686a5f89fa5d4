"""Sample the next token of each row from its logits on the device, without a sort.

What is computed stands in `engine/sampling.py`; tokens and decision margins are equal to its own,
bit for bit: noise and scores are in float64 by the logarithm of docs/arithmetic.md.

`sample_kernel`, rows with top_k of 1 to MAX_TOP_K, perhaps with min_p:

    1. The k-th largest of the maxima of blocks of columns bounds the k-th largest logit from below.
       Only blocks whose maximum reaches it hold kept tokens: their logits are gathered.
    2. Bisection over the bits finds the k-th largest logit. min_p may raise the cutoff.
    3. The kept tokens are gathered and scored. The largest score wins, the smallest id among ties.
    4. Tokens outside matter for the margin while their logit is above the cutoff minus the smallest
       margin so far: blocks are visited from the largest maximum down to there.

More ties than there is space for give OVERFLOW, and the host samples this row.
`sample_all_kernel`, rows that keep the full vocabulary: the two largest scores.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptbatch.pipeline.kernels.cuda.arithmetic import log
from gptbatch.pipeline.kernels.cuda.launch import launch
from gptbatch.pipeline.kernels.cuda.state import (
    FULL_VOCAB,
    KEPT_RANGE,
    MARGIN,
    NO_TOKEN,
    OVERFLOW,
    POSITION,
    SEED,
    STEP,
    TEMPERATURE,
    TOP_K,
)
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS

# The most tokens that top-k keeps on the device; a program gathers as many blocks of columns.
MAX_TOP_K = 64
# Kept tokens, with ties.
MAX_KEPT = 128
ALL_COLUMNS = 1024
LARGEST_INT32 = tl.constexpr(2147483647)
# `ordered_bits` of the smallest finite number.
MIN_FINITE_BITS = tl.constexpr(-2139095040)


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
def kth_largest(bits, k, low, high):
    """Return the k-th largest integer of `bits`, which is in low..high, by bisection."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = tl.sum((bits >= middle.to(tl.int32)).to(tl.int32))
        if count >= k:
            low = middle
        else:
            high = middle - 1
    return low.to(tl.int32)


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


@triton.jit
def sample_row(
    own,
    logits,
    block_max,
    blocks,
    kept,
    sampled,
    V,
    BLOCKS,
    BN: tl.constexpr,
    SIZE: tl.constexpr,
    GATHERED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Sample one row; the pointers are those of the row."""
    b = tl.arange(0, SIZE)
    maxima = tl.load(block_max + b, mask=b < BLOCKS, other=float("-inf"))
    is_finite = tl.max((maxima != maxima).to(tl.int32), axis=0) == 0
    largest = tl.max(maxima, axis=0)
    is_finite = is_finite & (largest < float("inf")) & (largest > float("-inf"))
    maxima = tl.where(is_finite, maxima, 0.0)
    k = tl.load(own + TOP_K)
    bits = ordered_bits(maxima)
    bits = tl.where(b < BLOCKS, bits, -LARGEST_INT32)
    top = tl.max(bits, axis=0)
    bound = kth_largest(bits, k, tl.min(bits, axis=0), top)
    # Fewer blocks than k bound nothing.
    bound = tl.where(k > BLOCKS, -LARGEST_INT32, bound)
    # A logit of -inf never wins: where fewer than k are larger, these are kept.
    bound = tl.maximum(bound, MIN_FINITE_BITS)
    reaches = (bits >= bound) & (b < BLOCKS)
    place = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    count = tl.sum(reaches.to(tl.int32))
    tl.store(blocks + place, b, mask=reaches & (place < GATHERED))
    tl.debug_barrier()

    place = tl.arange(0, GATHERED)
    block = tl.load(blocks + place, mask=place < count, other=0)
    column = block[:, None] * BN + tl.arange(0, BN)[None, :]
    is_column = (place < count)[:, None] & (column < V)
    values = tl.load(logits + column, mask=is_column, other=float("-inf"))
    values_bits = ordered_bits(values)
    kth_bits = kth_largest(values_bits, k, bound, top)
    kth = from_ordered_bits(kth_bits)
    reaches_kth = (values_bits >= kth_bits) & is_column
    # The (k + 1)-th largest logit, ties counted one by one.
    below = tl.max(tl.max(tl.where(reaches_kth, float("-inf"), values), axis=1), axis=0)
    outside = tl.max(tl.where(reaches | (b >= BLOCKS), float("-inf"), maxima), axis=0)
    below = tl.maximum(below, outside)
    next_largest = tl.where(tl.sum(reaches_kth.to(tl.int32)) > k, kth, below).to(tl.float64)
    kept_range = tl.load(own + KEPT_RANGE).to(tl.float64, bitcast=True)
    top_logit = from_ordered_bits(top).to(tl.float64)
    cutoff = tl.maximum(kth.to(tl.float64), top_logit - kept_range)
    is_kept = reaches_kth & (values.to(tl.float64) >= cutoff)
    flat_kept = tl.reshape(is_kept, (GATHERED * BN,))
    kept_place = tl.cumsum(flat_kept.to(tl.int32), axis=0) - 1
    kept_count = tl.sum(flat_kept.to(tl.int32))
    flat_column = tl.reshape(column, (GATHERED * BN,))
    tl.store(kept + kept_place, flat_column, mask=flat_kept & (kept_place < KEPT))
    is_top = (values_bits == top) & is_column
    second_largest = tl.max(tl.max(tl.where(is_top, float("-inf"), values), axis=1), axis=0)
    second_largest = tl.maximum(second_largest, outside)
    second_largest = tl.where(
        tl.sum(is_top.to(tl.int32)) > 1, from_ordered_bits(top), second_largest
    ).to(tl.float64)
    tl.debug_barrier()

    e = tl.arange(0, KEPT)
    is_entry = e < kept_count
    token = tl.load(kept + e, mask=is_entry, other=0)
    logit = tl.load(logits + token, mask=is_entry, other=float("-inf")).to(tl.float64)
    seed, step = tl.load(own + SEED), tl.load(own + STEP)
    temperature = tl.load(own + TEMPERATURE).to(tl.float64, bitcast=True)
    score = tl.where(is_entry, logit + temperature * gumbel(seed, step, token), float("-inf"))
    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(is_entry & (score == best), token, LARGEST_INT32), axis=0)
    second = tl.max(tl.where(is_entry & (token != winner), score, float("-inf")), axis=0)
    winning = tl.max(tl.where(is_entry & (token == winner), logit, float("-inf")), axis=0)
    largest_other = tl.where(winning == top_logit, second_largest, top_logit)
    reach = tl.minimum(winning - next_largest, winning - (largest_other - kept_range))
    margin = tl.load(own + MARGIN).to(tl.float64, bitcast=True)
    margin = tl.minimum(tl.minimum(best - second, reach), margin)

    has_room = (count <= GATHERED) & (kept_count <= KEPT)
    is_sampled = is_finite & has_room
    left = tl.where((b < BLOCKS) & is_sampled, maxima, float("-inf"))
    near = tl.max(left, axis=0).to(tl.float64)
    while (near >= cutoff - margin) & (near > float("-inf")):
        index = tl.min(tl.where(left.to(tl.float64) == near, b, SIZE), axis=0)
        near_column = index * BN + tl.arange(0, BN)
        z = tl.load(logits + near_column, mask=near_column < V, other=float("-inf")).to(tl.float64)
        is_near = (z < cutoff) & (z >= cutoff - margin) & (z > float("-inf"))
        to_win = best - (z + temperature * gumbel(seed, step, near_column))
        distance = tl.where(is_near, tl.maximum(cutoff - z, to_win), float("inf"))
        margin = tl.minimum(margin, tl.min(distance, axis=0))
        left = tl.where(b == index, float("-inf"), left)
        near = tl.max(left, axis=0).to(tl.float64)
    token = tl.where(is_finite, tl.where(has_room, winner, OVERFLOW), NO_TOKEN)
    tl.store(sampled, token)
    if is_sampled:
        tl.store(own + MARGIN, margin.to(tl.int64, bitcast=True))


@triton.jit
def sample_kernel(
    logits,
    block_max,
    state,
    blocks_scratch,
    kept_scratch,
    sampled,
    stride,
    state_stride,
    V,
    BLOCKS,
    BN: tl.constexpr,
    SIZE: tl.constexpr,
    GATHERED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Sample one row per program where the row runs and top_k is 1 or more."""
    row = tl.program_id(0).to(tl.int64)
    own = state + row * state_stride
    if (tl.load(own + POSITION) >= 0) & (tl.load(own + TOP_K) >= 1):
        sample_row(
            own,
            logits + row * stride,
            block_max + row * BLOCKS,
            blocks_scratch + row * GATHERED,
            kept_scratch + row * KEPT,
            sampled + row,
            V,
            BLOCKS,
            BN,
            SIZE,
            GATHERED,
            KEPT,
        )


@triton.jit
def sample_all_kernel(
    logits,
    block_max,
    state,
    sampled,
    stride,
    state_stride,
    V,
    BLOCKS,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sample one row per program where the row runs and keeps the full vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    own = state + row * state_stride
    if (tl.load(own + POSITION) >= 0) & (tl.load(own + TOP_K) == FULL_VOCAB):
        b = tl.arange(0, SIZE)
        maxima = tl.load(block_max + row * BLOCKS + b, mask=b < BLOCKS, other=float("-inf"))
        is_finite = tl.max((maxima != maxima).to(tl.int32), axis=0) == 0
        largest = tl.max(maxima, axis=0)
        is_finite = is_finite & (largest < float("inf")) & (largest > float("-inf"))
        seed, step = tl.load(own + SEED), tl.load(own + STEP)
        temperature = tl.load(own + TEMPERATURE).to(tl.float64, bitcast=True)
        lane = tl.arange(0, COLUMNS)
        best = tl.full((COLUMNS,), float("-inf"), tl.float64)
        second = best
        token = lane
        for first in range(0, V, COLUMNS):
            column = first + lane
            z = tl.load(logits + row * stride + column, mask=column < V, other=float("-inf"))
            score = z.to(tl.float64) + temperature * gumbel(seed, step, column)
            is_better = score > best
            second = tl.maximum(second, tl.where(is_better, best, score))
            token = tl.where(is_better, column, token)
            best = tl.where(is_better, score, best)
        whole_best = tl.max(best, axis=0)
        winner = tl.min(tl.where(best == whole_best, token, LARGEST_INT32), axis=0)
        other = tl.max(tl.where(token == winner, second, best), axis=0)
        margin = tl.load(own + MARGIN).to(tl.float64, bitcast=True)
        margin = tl.minimum(margin, whole_best - other)
        tl.store(sampled + row, tl.where(is_finite, winner, NO_TOKEN))
        if is_finite:
            tl.store(own + MARGIN, margin.to(tl.int64, bitcast=True))


def sample(
    logits: Tensor,
    block_max: Tensor,
    state: Tensor,
    scratch: Tensor,
    sampled: Tensor,
    *,
    full_vocab: bool,
) -> None:
    """Sample the next token of each row that runs and whose TOP_K is not HOST_SAMPLES.

    Args:
        logits: (S, V) float32, its rows contiguous.
        block_max: (S, blocks) float32: the largest logit of each MAX_COLUMNS columns.
        state: (sequences, fields) int64; MARGIN is lowered to the margin of this step.
        scratch: (S, MAX_TOP_K + MAX_KEPT) int32, contiguous.
        sampled: Gets the tokens (S,) int32, or NO_TOKEN or OVERFLOW.
        full_vocab: Whether a row may have FULL_VOCAB.
    """
    rows, vocab_size = logits.shape
    blocks = block_max.shape[1]
    size = triton.next_power_of_2(blocks)
    flat = scratch.view(-1)
    launch(
        sample_kernel,
        (rows,),
        *(logits, block_max, state, flat, flat[rows * MAX_TOP_K :], sampled),
        *(logits.stride(0), state.stride(0), vocab_size, blocks),
        *(MAX_COLUMNS, size, MAX_TOP_K, MAX_KEPT),
        num_warps=8,
        enable_fp_fusion=False,
    )
    if full_vocab:
        launch(
            sample_all_kernel,
            (rows,),
            *(logits, block_max, state, sampled, logits.stride(0), state.stride(0)),
            *(vocab_size, blocks, size, ALL_COLUMNS),
            num_warps=8,
            enable_fp_fusion=False,
        )
