"""Sample the next token of a row that top_k, top_p or min_p filters, without a sort.

    1. The cutoffs (cutoff.py): the k-th largest logit, that of min_p, that of top_p.
    2. The kept tokens are scored. The largest score wins, the smallest id among ties.
    3. The reach of the winner lowers the margin.
    4. Tokens outside whose reach may be below the margin are scored, too.

The reach of a token outside that top_p leaves out takes a search. It grows as logits fall, so only
tokens above the last one that was searched matter: few searches are needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptbatch.pipeline.kernels.cuda.arithmetic import log
from gptbatch.pipeline.kernels.cuda.cutoff import (
    COUNT,
    COUNTS,
    CUT,
    CUTOFFS,
    KEPT,
    OUTSIDE,
    REACHES,
    guess_range,
    listed_mass,
    search,
)
from gptbatch.pipeline.kernels.cuda.launch import wait_for_previous
from gptbatch.pipeline.kernels.cuda.masses import MIN_EXPONENT, distance, masses
from gptbatch.pipeline.kernels.cuda.scores import best_tokens, nearest_outside
from gptbatch.pipeline.kernels.cuda.state import (
    FULL_VOCAB,
    HOST_SAMPLES,
    KEPT_RANGE,
    MARGIN,
    NO_TOKEN,
    POSITION,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from gptbatch.pipeline.kernels.cuda.tokens import (
    LARGEST_INT32,
    LOWEST_BITS,
    can_be_sampled,
    ceil_bits,
    halfway,
    largest_besides,
    neighbours,
    ordered_bits,
    value_of,
)

# Covers the rounding of logarithms where only tokens that may matter are gathered.
TOLERANCE = tl.constexpr(1e-9)
# A logit of -inf never wins: where fewer than k are larger, these alone are scored.
FINITE_FROM = tl.constexpr(LOWEST_BITS.value + 1)


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
def find_cutoffs(
    own, logits, block_max, maxima, blocks, listed, listed_masses, top, log_odds, V, BLOCKS,
    HAS_TOP_P: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Find the cutoffs of top_k and of top_p.

    Returns:
        Their ordered bits, those of -inf for none; the largest logit that top_k leaves out; the
        total mass and what is listed, as `search` does.
    """
    b = tl.arange(0, SIZE)
    beyond = ordered_bits(top) + 1
    k = tl.load(own + TOP_K).to(tl.int32)
    temperature = tl.load(own + TEMPERATURE).to(tl.float64, bitcast=True)
    none, massless = k * 0, (k * 0).to(tl.int64)
    kth, nucleus = none + LOWEST_BITS, none + LOWEST_BITS
    n_kept = V + massless
    next_largest = temperature * 0.0 - float("inf")
    total, base = massless, massless
    list_low, list_high, count = beyond, none, none
    KINDS: tl.constexpr = CUTOFFS if HAS_TOP_P else COUNTS
    kind = tl.where(k > 0, COUNT, CUT)
    while kind <= (CUT if HAS_TOP_P else COUNT):
        guess_low, guess_high = kth, beyond
        if (kind == COUNT) & (k <= BLOCKS):
            # k blocks have a logit that reaches the k-th largest of their maxima.
            bits = tl.where(b < BLOCKS, ordered_bits(maxima), -LARGEST_INT32)
            guess_low = kth_largest(bits, k, kth, beyond)
        elif n_kept > CAPACITY:
            finite = tl.where(maxima > float("-inf"), maxima, top)
            lowest = top - 4.0 * (top - tl.min(finite, axis=0))
            share = k.to(tl.float32)
            if HAS_TOP_P:  # noqa: SIM102
                if kind == CUT:
                    deepest = top.to(tl.float64) + MIN_EXPONENT * temperature
                    lowest = tl.maximum(deepest, value_of(kth)).to(tl.float32)
                    share = tl.load(own + TOP_P).to(tl.float64, bitcast=True).to(tl.float32)
            guess_low, guess_high = guess_range(
                kind, logits, block_max, blocks, lowest, top, temperature, share, V, BLOCKS,
                KINDS, BN, SIZE, TILE, CAPACITY,
            )  # fmt: skip
            guess_high = tl.minimum(tl.maximum(guess_high, kth), beyond)
            guess_low = tl.minimum(tl.maximum(guess_low, kth), guess_high)
        # Nothing is listed that the second search could use: the masses of the first are 1.
        bound, mass, total, list_low, list_high, base, count = search(
            kind, own, logits, block_max, blocks, listed, listed_masses,
            kth, kth, beyond, guess_low, guess_high, next_largest, massless, total,
            beyond, none, massless, none, top, log_odds, V, BLOCKS,
            KINDS, BITS, BN, SIZE, TILE, CAPACITY,
        )  # fmt: skip
        if kind == COUNT:
            kth = bound - 1
            n_kept = mass
            next_largest = value_of(kth)
            if n_kept <= k:
                next_largest = neighbours(
                    logits, block_max, blocks, kth, V, BLOCKS, BN, SIZE, TILE
                )[0]  # fmt: skip
        else:
            nucleus = bound - 1
        kind += 1
    return kth, nucleus, next_largest, total, list_low, list_high, base, count


@triton.jit
def sample_kept(
    own, logits, block_max, blocks, buffer, sampled, top, cutoff_bits, next_largest, V, BLOCKS,
    BN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Sample one of the tokens from the cutoff on.

    Returns:
        The winner's logit and score, and the margin but for top_p and for the tokens outside.
    """
    token, best, second = best_tokens(
        own, logits, block_max, blocks, buffer, cutoff_bits, ordered_bits(top) + 1, V, BLOCKS,
        BN, SIZE, TILE, SCORES,
    )  # fmt: skip
    tl.store(sampled, token)
    winning = tl.load(logits + token).to(tl.float64)
    other = largest_besides(logits, block_max, token, V, BLOCKS, BN, SIZE).to(tl.float64)
    kept_range = tl.load(own + KEPT_RANGE).to(tl.float64, bitcast=True)
    reach = winning - tl.maximum(next_largest, other - kept_range)
    margin = tl.load(own + MARGIN).to(tl.float64, bitcast=True)
    return winning, best, tl.minimum(margin, tl.minimum(best - second, reach))


@triton.jit
def margin_by_top_p(
    own, logits, block_max, blocks, buffer, listed, listed_masses, top, log_odds,
    kth, nucleus_from, base_cutoff, cutoff_bits, logit, best, margin,
    total, list_low, list_high, base, count, V, BLOCKS,
    BITS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    SCORES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Lower the margin of the winner, with this logit, by its reach and by the tokens outside.

    The first search of the loop is that of the winner, KEPT. The others are OUTSIDE.
    """
    none, massless = kth * 0, total * 0
    temperature = tl.load(own + TEMPERATURE).to(tl.float64, bitcast=True)
    # Tokens below have a reach above the margin.
    wide = margin * (1.0 + TOLERANCE) + TOLERANCE
    mass = base + listed_mass(listed, listed_masses, count, list_low, REACHES, TILE)
    near_bits = ceil_bits(value_of(list_low) - wide)
    if -distance(mass, total, temperature, log_odds) < wide:
        near_bits = none + LOWEST_BITS

    own_mass = masses((logit - top.to(tl.float64)) / temperature, BITS)
    high = ordered_bits(logit.to(tl.float32))
    low = tl.maximum(tl.minimum(ceil_bits(logit - margin) - 1, high), LOWEST_BITS)
    # Where the list begins and ends the bound may be known to lie on one side. A branch of its own
    # holds fewer registers.
    if (low < list_low) & (list_low < high):  # noqa: SIM102
        if distance(mass - own_mass, total, temperature, log_odds) <= logit - value_of(list_low):
            low = list_low
    kind = none + KEPT
    left = logit * 0.0 - float("inf")
    while left < margin:
        if list_high < high:
            moves = distance(base - own_mass, total, temperature, log_odds)
            is_below = (low < list_high) & (-moves <= value_of(list_high - 1) - logit)
            if tl.where(kind == KEPT, moves >= margin, is_below):
                high = list_high
        bound, mass, total, list_low, list_high, base, count = search(
            kind, own, logits, block_max, blocks, listed, listed_masses,
            kth, low, high, low, high, logit, own_mass, total,
            list_low, list_high, base, count, top, log_odds, V, BLOCKS,
            REACHES, BITS, BN, SIZE, TILE, CAPACITY,
        )  # fmt: skip
        below, above = neighbours(
            logits, block_max, blocks, bound - (kind == OUTSIDE).to(tl.int32), V, BLOCKS,
            BN, SIZE, TILE,
        )  # fmt: skip
        reach = distance(mass - own_mass, total, temperature, log_odds)
        if kind == KEPT:
            if bound > low:
                reach = tl.maximum(tl.minimum(logit - below, reach), 0.0)
                margin = tl.minimum(margin, reach)
            cutoff = tl.maximum(base_cutoff, nucleus_from)
            low = tl.maximum(tl.minimum(ceil_bits(cutoff - margin), near_bits), FINITE_FROM)
            own_mass = massless
            kind = none + OUTSIDE
        else:
            reach = tl.maximum(tl.minimum(above - logit, -reach), 0.0)
            margin = tl.minimum(margin, tl.maximum(left, reach))
            low = ordered_bits(logit.to(tl.float32)) + 1
        if left < margin:
            least, left, logit = nearest_outside(
                own, logits, block_max, blocks, buffer, low, cutoff_bits, nucleus_from, best,
                base_cutoff, V, BLOCKS, BN, SIZE, TILE, SCORES,
            )  # fmt: skip
            margin = tl.minimum(margin, least)
            low = ordered_bits(logit.to(tl.float32))
            high = tl.minimum(ceil_bits(logit + margin) + 1, ordered_bits(top) + 1)
    return margin


@triton.jit
def sample_filtered_row(
    own, logits, block_max, maxima, blocks, buffer, listed, listed_masses, sampled, V, BLOCKS,
    HAS_TOP_P: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, SCORES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Sample one row whose logits are finite, but for -inf; the pointers are those of the row."""
    top = tl.max(maxima, axis=0)
    log_odds = top.to(tl.float64) * 0.0
    if HAS_TOP_P:
        top_p = tl.load(own + TOP_P).to(tl.float64, bitcast=True)
        log_odds = log(top_p / (1.0 - top_p))
    kth, nucleus, next_largest, total, list_low, list_high, base, count = find_cutoffs(
        own, logits, block_max, maxima, blocks, listed, listed_masses, top, log_odds, V, BLOCKS,
        HAS_TOP_P, BITS, BN, SIZE, TILE, CAPACITY,
    )  # fmt: skip
    kept_range = tl.load(own + KEPT_RANGE).to(tl.float64, bitcast=True)
    base_cutoff = tl.maximum(value_of(kth), top.to(tl.float64) - kept_range)
    nucleus_from = value_of(nucleus)
    cutoff = tl.maximum(base_cutoff, nucleus_from)
    cutoff_bits = tl.maximum(ceil_bits(cutoff), FINITE_FROM)
    logit, best, margin = sample_kept(
        own, logits, block_max, blocks, buffer, sampled, top, cutoff_bits, next_largest, V, BLOCKS,
        BN, SIZE, TILE, SCORES,
    )  # fmt: skip
    if HAS_TOP_P:
        margin = margin_by_top_p(
            own, logits, block_max, blocks, buffer, listed, listed_masses, top, log_odds,
            kth, nucleus_from, base_cutoff, cutoff_bits, logit, best, margin,
            total, list_low, list_high, base, count, V, BLOCKS,
            BITS, BN, SIZE, TILE, SCORES, CAPACITY,
        )  # fmt: skip
    else:
        least, _, _ = nearest_outside(
            own, logits, block_max, blocks, buffer,
            tl.maximum(ceil_bits(cutoff - margin), FINITE_FROM), cutoff_bits,
            nucleus_from, best, base_cutoff, V, BLOCKS, BN, SIZE, TILE, SCORES,
        )  # fmt: skip
        margin = tl.minimum(margin, least)
    tl.store(own + MARGIN, margin.to(tl.int64, bitcast=True))


@triton.jit
def sample_filtered_kernel(
    logits, block_max, state, scratch, listed_masses, sampled,
    stride, state_stride, scratch_stride, V, BLOCKS,
    HAS_TOP_P: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, SCORES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Sample one row per program: those that run, have a filter, and have a top_p or not."""
    wait_for_previous()
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
                own, logits + row * stride, own_max, maxima, blocks, blocks + BLOCKS,
                blocks + BLOCKS + 2 * TILE, listed_masses + row * CAPACITY, sampled + row,
                V, BLOCKS, HAS_TOP_P, BITS, BN, SIZE, TILE, SCORES, CAPACITY,
            )  # fmt: skip
        else:
            tl.store(sampled + row, NO_TOKEN)
