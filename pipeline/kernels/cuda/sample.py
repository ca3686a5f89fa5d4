"""Sample the next token of each row from its logits: top-k and temperature, without a sort.

The k-th largest of the maxima of blocks of columns is a lower bound of the k-th largest logit, and
only blocks whose maximum reaches it hold kept tokens. Their logits are gathered. Bisection over the
bits finds the exact k-th largest. The kept tokens are gathered and scored in float64 with the noise
of `engine/noise.py`, whose logarithm is the GPU's and not portable. The largest score wins, the
smallest token id among ties. See `engine/sampling.py` for what is computed. The decision margin has
two of its three distances: that of tokens outside which would be kept and win is missing, and ties
with the k-th logit do not count, so the margin can be too large.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a program can gather: blocks that reach the bound, which are at least top_k, and kept tokens.
# With more of either (ties), the token is OVERFLOW.
MAX_BLOCKS = 64
MAX_KEPT = 128
NO_TOKEN, OVERFLOW = tl.constexpr(-1), tl.constexpr(-2)


@triton.jit
def ordered_bits(x):
    """Map float32 to int32 so that larger numbers have larger integers; -0 equals 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


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
    return -tl.log(-tl.log(uniform))


@triton.jit
def sample_kernel(
    logits,
    block_max,
    positions,
    seeds,
    steps,
    temperatures,
    top_k,
    blocks_scratch,
    kept_scratch,
    tokens,
    margins,
    V,
    stride,
    BLOCKS,
    BN: tl.constexpr,
    SIZE: tl.constexpr,
    GATHERED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Sample one row per program.

    logits (M, V) float32, rows `stride` apart; block_max (M, BLOCKS): the largest logit of each BN
    columns; positions (M,), -1 in rows without a sequence, which nothing is
    stored for; seeds and steps (M,) int64; temperatures (M,) float64; top_k (M,), 1 to GATHERED;
    scratch of GATHERED and KEPT int32 per row. tokens (M,): NO_TOKEN if the logits are not finite,
    OVERFLOW if a scratch is too small.
    margins (M,) float64: the smallest so far, lowered by this step's.
    """
    row = tl.program_id(0)
    is_running = tl.load(positions + row) >= 0
    b = tl.arange(0, SIZE)
    maxima = tl.load(block_max + row * BLOCKS + b, mask=b < BLOCKS, other=float("-inf"))
    is_finite = tl.sum((maxima != maxima).to(tl.int32)) == 0
    largest = tl.max(maxima, axis=0)
    is_finite = is_finite & (largest < float("inf")) & (largest > float("-inf"))
    k = tl.load(top_k + row)
    bits = ordered_bits(maxima)
    top = tl.max(bits, axis=0)
    bound = kth_largest(bits, k, tl.min(bits, axis=0), top)
    reaches = (bits >= bound) & (b < BLOCKS)
    place = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    count = tl.sum(reaches.to(tl.int32))
    scratch = blocks_scratch + row * GATHERED
    tl.store(scratch + place, b, mask=reaches & (place < GATHERED))
    tl.debug_barrier()

    place = tl.arange(0, GATHERED)
    block = tl.load(scratch + place, mask=place < count, other=0)
    column = block[:, None] * BN + tl.arange(0, BN)[None, :]
    is_column = (place < count)[:, None] & (column < V)
    values = tl.load(
        logits + row.to(tl.int64) * stride + column, mask=is_column, other=float("-inf")
    )
    values_bits = ordered_bits(values)
    kth = kth_largest(values_bits, k, bound, top)
    is_kept = (values_bits >= kth) & is_column
    flat_kept = tl.reshape(is_kept, (GATHERED * BN,))
    flat_column = tl.reshape(column, (GATHERED * BN,))
    kept_place = tl.cumsum(flat_kept.to(tl.int32), axis=0) - 1
    kept_count = tl.sum(flat_kept.to(tl.int32))
    kept = kept_scratch + row * KEPT
    tl.store(kept + kept_place, flat_column, mask=flat_kept & (kept_place < KEPT))
    outside = tl.max(tl.max(tl.where(is_kept, float("-inf"), values), axis=1), axis=0)
    outside = tl.maximum(outside, tl.max(tl.where(reaches, float("-inf"), maxima), axis=0))
    tl.debug_barrier()

    e = tl.arange(0, KEPT)
    is_entry = e < kept_count
    token = tl.load(kept + e, mask=is_entry, other=0)
    logit = tl.load(
        logits + row.to(tl.int64) * stride + token, mask=is_entry, other=float("-inf")
    ).to(tl.float64)
    noise = gumbel(tl.load(seeds + row), tl.load(steps + row), token)
    temperature = tl.load(temperatures + row)
    score = tl.where(is_entry, logit + temperature * noise, float("-inf"))
    best = tl.max(score, axis=0)
    winner = tl.min(tl.where(is_entry & (score == best), token, 2147483647), axis=0)
    second = tl.max(tl.where(token == winner, float("-inf"), score), axis=0)
    winning = tl.max(tl.where(is_entry & (token == winner), logit, float("-inf")), axis=0)
    margin = tl.minimum(best - second, winning - outside.to(tl.float64))
    has_room = (count <= GATHERED) & (kept_count <= KEPT)
    token = tl.where(is_finite, tl.where(has_room, winner, OVERFLOW), NO_TOKEN)
    tl.store(tokens + row, token, mask=is_running)
    margin = tl.minimum(tl.load(margins + row), margin)
    tl.store(margins + row, margin, mask=is_running & (token >= 0))


@triton.jit
def advance_kernel(
    sampled,
    tokens,
    positions,
    steps,
    budgets,
    ring,
    eos_token_id,
    ROWS,
    SIZE: tl.constexpr,
    RING: tl.constexpr,
):
    """Take the sampled tokens as the next inputs; a row that ends gets position -1.

    NO_TOKEN and OVERFLOW end a row too. The host makes an error row of the first, and samples the
    second itself.

    sampled, tokens, positions (ROWS,) int32; steps and budgets (ROWS,) int64; ring (ROWS, RING):
    the new tokens by step.
    """
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = row < ROWS
    position = tl.load(positions + row, mask=mask, other=-1)
    is_running = mask & (position >= 0)
    token = tl.load(sampled + row, mask=is_running, other=-1)
    step = tl.load(steps + row, mask=is_running, other=0)
    budget = tl.load(budgets + row, mask=is_running, other=0)
    tl.store(ring + row * RING + step % RING, token, mask=is_running)
    tl.store(tokens + row, tl.maximum(token, 0), mask=is_running)
    is_last = (step + 1 >= budget) | (token == eos_token_id) | (token < 0)
    tl.store(positions + row, tl.where(is_last, -1, position + 1), mask=is_running)
    tl.store(steps + row, step + 1, mask=is_running)
