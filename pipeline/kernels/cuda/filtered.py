"""Sample the next token of a row that top_k, top_p or min_p filters, without a sort.

    1. The cutoffs (cutoff.py): the k-th largest logit, that of min_p, that of top_p.
    2. Kept tokens are gathered from the blocks whose largest logit reaches the cutoff, and scored
       whenever the buffer is full. The largest score wins, the smallest id among ties.
    3. The reach of the winner lowers the margin.
    4. Tokens outside whose reach may be below the margin are gathered and scored, too.

The reach of a token outside that top_p leaves out takes a search. It grows as logits fall, so only
tokens above the last one that was searched matter: few searches are needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptbatch.pipeline.kernels.cuda.arithmetic import log
from gptbatch.pipeline.kernels.cuda.cutoff import (
    CUT,
    KEPT,
    OUTSIDE,
    guess_range,
    holds,
    listed_mass,
    search,
)
from gptbatch.pipeline.kernels.cuda.masses import MIN_EXPONENT, distance, masses
from gptbatch.pipeline.kernels.cuda.state import (
    FULL_VOCAB,
    HOST_SAMPLES,
    KEPT_RANGE,
    MARGIN,
    NO_TOKEN,
    POSITION,
    SEED,
    STEP,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from gptbatch.pipeline.kernels.cuda.tokens import (
    LARGEST_INT32,
    LOWEST_BITS,
    can_be_sampled,
    ceil_bits,
    columns_of,
    gumbel,
    halfway,
    largest_below,
    largest_besides,
    list_blocks,
    ordered_bits,
    smallest_from,
    value_of,
)

# Covers the rounding of logarithms where only tokens that may matter are gathered.
TOLERANCE = tl.constexpr(1e-9)


@triton.jit
def kth_largest(bits, k, low, high):
    """Return the k-th largest integer of `bits`, which is in low .. high - 1, by bisection."""
    while low + 1 < high:
        middle = halfway(low, high)
        if tl.sum((bits >= middle).to(tl.int32)) >= k:
            low = middle
        else:
            high = middle
    return low


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
    count = list_blocks(block_max, blocks, low, BLOCKS, SIZE)
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
    count = list_blocks(block_max, blocks, low, BLOCKS, SIZE)
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


@triton.jit
def sample_filtered_row(
    own, logits, block_max, blocks, buffer, listed, listed_masses, sampled, V, BLOCKS,
    HAS_TOP_P: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, SCORES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Sample one row whose logits are finite, but for -inf; the pointers are those of the row."""
    b = tl.arange(0, SIZE)
    maxima = tl.load(block_max + b, mask=b < BLOCKS, other=float("-inf"))
    top = tl.max(maxima, axis=0)
    largest = top.to(tl.float64)
    beyond = ordered_bits(top) + 1
    k = tl.load(own + TOP_K).to(tl.int32)
    temperature = tl.load(own + TEMPERATURE).to(tl.float64, bitcast=True)
    kept_range = tl.load(own + KEPT_RANGE).to(tl.float64, bitcast=True)
    none, massless, nothing = k * 0, (k * 0).to(tl.int64), largest * 0.0 - float("inf")

    kth = none + LOWEST_BITS
    n_kept = V + massless
    next_largest = nothing
    if k > 0:
        if k <= BLOCKS:
            # k blocks have a logit that reaches the k-th largest of their maxima.
            bits = tl.where(b < BLOCKS, ordered_bits(maxima), -LARGEST_INT32)
            guess_low = kth_largest(bits, k, kth, beyond)
            guess_high = beyond
        else:
            finite = tl.where(maxima > float("-inf"), maxima, top)
            lowest = top - 4.0 * (top - tl.min(finite, axis=0))
            guess_low, guess_high = guess_range(
                logits, block_max, blocks, lowest, top, temperature, k, V, BLOCKS,
                False, BN, SIZE, TILE, CAPACITY,
            )  # fmt: skip
        guess_high = tl.minimum(tl.maximum(guess_high, kth), beyond)
        guess_low = tl.minimum(tl.maximum(guess_low, kth), guess_high)
        bound, _, n_kept, _, _, _, _, _ = search(
            logits, block_max, blocks, listed, listed_masses,
            kth, kth, beyond, guess_low, guess_high, k.to(tl.float64), largest, massless, massless,
            beyond, none, massless, none, largest, temperature, largest, V, BLOCKS,
            CUT, False, BITS, BN, SIZE, TILE, CAPACITY,
        )  # fmt: skip
        kth = bound - 1
        next_largest = value_of(kth)
        if n_kept <= k:
            next_largest = largest_below(
                logits, block_max, blocks, kth, V, BLOCKS, BN, SIZE, TILE
            ).to(tl.float64)
    # kth is -inf where there is no k.
    base_cutoff = tl.maximum(value_of(kth), largest - kept_range)
    cutoff = base_cutoff
    nucleus_from = nothing
    if HAS_TOP_P:
        top_p = tl.load(own + TOP_P).to(tl.float64, bitcast=True)
        log_odds = log(top_p / (1.0 - top_p))
        guess_low, guess_high = kth, beyond
        if n_kept > CAPACITY:
            deepest = (largest + MIN_EXPONENT * temperature).to(tl.float32)
            lowest = tl.maximum(deepest, value_of(kth).to(tl.float32))
            guess_low, guess_high = guess_range(
                logits, block_max, blocks, lowest, top, temperature, top_p.to(tl.float32), V,
                BLOCKS, True, BN, SIZE, TILE, CAPACITY,
            )  # fmt: skip
            guess_high = tl.minimum(tl.maximum(guess_high, kth), beyond)
            guess_low = tl.minimum(tl.maximum(guess_low, kth), guess_high)
        bound, _, _, total, list_low, list_high, base, count = search(
            logits, block_max, blocks, listed, listed_masses,
            kth, kth, beyond, guess_low, guess_high, top_p, largest, massless, massless,
            beyond, none, massless, none, largest, temperature, log_odds, V, BLOCKS,
            CUT, True, BITS, BN, SIZE, TILE, CAPACITY,
        )  # fmt: skip
        nucleus_from = value_of(bound - 1)
        cutoff = tl.maximum(cutoff, nucleus_from)

    # A logit of -inf never wins: where fewer than k are larger, these alone are scored.
    finite_from = LOWEST_BITS + 1
    cutoff_bits = tl.maximum(ceil_bits(cutoff), finite_from)
    token, best, second = best_tokens(
        own, logits, block_max, blocks, buffer, cutoff_bits, beyond, V, BLOCKS,
        BN, SIZE, TILE, SCORES,
    )  # fmt: skip
    winning = tl.load(logits + token).to(tl.float64)
    other = largest_besides(logits, block_max, token, V, BLOCKS, BN, SIZE).to(tl.float64)
    kept_range = tl.load(own + KEPT_RANGE).to(tl.float64, bitcast=True)
    reach = winning - tl.maximum(next_largest, other - kept_range)
    margin = tl.load(own + MARGIN).to(tl.float64, bitcast=True)
    margin = tl.minimum(margin, tl.minimum(best - second, reach))

    if HAS_TOP_P:
        # Tokens below have a reach above the margin.
        wide = margin * (1.0 + TOLERANCE) + TOLERANCE
        mass = base + listed_mass(listed, listed_masses, count, list_low, True, TILE)
        nucleus_near = value_of(list_low) - wide
        if -distance(mass, total, temperature, log_odds) < wide:
            nucleus_near = nothing

        own_mass = masses((winning - largest) / temperature, BITS)
        high = ordered_bits(winning.to(tl.float32))
        low = tl.maximum(tl.minimum(ceil_bits(winning - margin) - 1, high), LOWEST_BITS)
        # Where the list begins and ends the reach may be known to lie on one side.
        if (list_high < high) & (distance(base - own_mass, total, temperature, log_odds) >= margin):
            high = list_high
        # A branch of its own holds fewer registers.
        if (low < list_low) & (list_low < high):  # noqa: SIM102
            if distance(mass - own_mass, total, temperature, log_odds) <= winning - value_of(
                list_low
            ):
                low = list_low
        bound, mass, _, _, list_low, list_high, base, count = search(
            logits, block_max, blocks, listed, listed_masses,
            kth, low, high, low, high, top_p, winning, own_mass, total,
            list_low, list_high, base, count, largest, temperature, log_odds, V, BLOCKS,
            KEPT, True, BITS, BN, SIZE, TILE, CAPACITY,
        )  # fmt: skip
        if bound > low:
            gap = winning - largest_below(
                logits, block_max, blocks, bound, V, BLOCKS, BN, SIZE, TILE
            ).to(tl.float64)
            reach = tl.minimum(gap, distance(mass - own_mass, total, temperature, log_odds))
            margin = tl.minimum(margin, tl.maximum(reach, 0.0))

        low = tl.maximum(ceil_bits(tl.minimum(cutoff - margin, nucleus_near)), finite_from)
        left = nothing
        while left < margin:
            least, left, logit = nearest_outside(
                own, logits, block_max, blocks, buffer, low, cutoff_bits, nucleus_from, best,
                base_cutoff, V, BLOCKS, BN, SIZE, TILE, SCORES,
            )  # fmt: skip
            margin = tl.minimum(margin, least)
            if left < margin:
                low = ordered_bits(logit.to(tl.float32))
                high = tl.minimum(ceil_bits(logit + margin) + 1, beyond)
                if (low < list_high) & (list_high < high):  # noqa: SIM102
                    if holds(
                        *(OUTSIDE, list_high, base, top_p, logit, massless),
                        *(total, temperature, log_odds),
                    ):
                        high = list_high
                bound, _, mass, _, list_low, list_high, base, count = search(
                    logits, block_max, blocks, listed, listed_masses,
                    kth, low, high, low, high, top_p, logit, massless, total,
                    list_low, list_high, base, count, largest, temperature, log_odds, V, BLOCKS,
                    OUTSIDE, True, BITS, BN, SIZE, TILE, CAPACITY,
                )  # fmt: skip
                gap = smallest_from(
                    logits, block_max, blocks, bound - 1, V, BLOCKS, BN, SIZE, TILE
                ).to(tl.float64)
                reach = tl.minimum(gap - logit, -distance(mass, total, temperature, log_odds))
                margin = tl.minimum(margin, tl.maximum(left, tl.maximum(reach, 0.0)))
                low += 1
    else:
        least, _, _ = nearest_outside(
            own, logits, block_max, blocks, buffer,
            tl.maximum(ceil_bits(cutoff - margin), finite_from), cutoff_bits,
            nucleus_from, best, base_cutoff, V, BLOCKS, BN, SIZE, TILE, SCORES,
        )  # fmt: skip
        margin = tl.minimum(margin, least)
    tl.store(sampled, token)
    tl.store(own + MARGIN, margin.to(tl.int64, bitcast=True))


@triton.jit
def sample_filtered_kernel(
    logits, block_max, state, scratch, listed_masses, sampled,
    stride, state_stride, scratch_stride, V, BLOCKS,
    HAS_TOP_P: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, SCORES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Sample one row per program: those that run, have a filter, and have a top_p or not."""
    row = tl.program_id(0).to(tl.int64)
    own = state + row * state_stride
    k = tl.load(own + TOP_K)
    is_one = (tl.load(own + POSITION) >= 0) & (k > HOST_SAMPLES)
    has_top_p = tl.load(own + TOP_P).to(tl.float64, bitcast=True) < 1.0
    if HAS_TOP_P:
        is_one = is_one & has_top_p
    else:
        kept_range = tl.load(own + KEPT_RANGE).to(tl.float64, bitcast=True)
        is_one = is_one & (has_top_p == 0) & ((k != FULL_VOCAB) | (kept_range < float("inf")))
    if is_one:
        b = tl.arange(0, SIZE)
        own_max = block_max + row * BLOCKS
        maxima = tl.load(own_max + b, mask=b < BLOCKS, other=float("-inf"))
        if can_be_sampled(maxima):
            blocks = scratch + row * scratch_stride
            sample_filtered_row(
                own, logits + row * stride, own_max, blocks, blocks + BLOCKS,
                blocks + BLOCKS + 2 * TILE, listed_masses + row * CAPACITY, sampled + row,
                V, BLOCKS, HAS_TOP_P, BITS, BN, SIZE, TILE, SCORES, CAPACITY,
            )  # fmt: skip
        else:
            tl.store(sampled + row, NO_TOKEN)
