"""Find where a condition on the tokens of one row begins to hold, without a sort.

    mass(b)    sum over the tokens whose logits have ordered bits of at least b
    holds(b)   false for small b, true for large b; by `mass(b)`

`search` returns the smallest b for which `holds` is true. That is

    CUT        mass(b) < limit                                    below it lies the cutoff
    KEPT       h(mass(b) - own) > logit - b                       reach of a kept token
    OUTSIDE    -h(mass(b)) <= (b - 1) - logit                     reach of a token outside

The limit is top_p of all masses, or k where each token counts 1: then the cutoff is the k-th
largest logit. The cutoff is guessed first. One pass over the row adds the exact masses above the
guessed range and lists the tokens inside it, which shows whether the cutoff is there. A bisection
over the list finds it. A wrong guess costs more passes: they halve the range until its tokens fit
into the list. Masses are whole numbers, so that sums do not depend on an order.

Pivots instead of a sort, and a buffer of likely tokens: Park et al., "Qrita" (vLLM's sampler), and
FlashInfer's sampling kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptbatch.pipeline.kernels.cuda.arithmetic import exp
from gptbatch.pipeline.kernels.cuda.masses import MIN_EXPONENT, distance, masses
from gptbatch.pipeline.kernels.cuda.tokens import (
    LARGEST_INT32,
    ceil_bits,
    columns_of,
    halfway,
    list_blocks,
    ordered_bits,
    value_of,
)

CUT, KEPT, OUTSIDE = (tl.constexpr(i) for i in range(3))
MAX_GUESSES = tl.constexpr(8)


@triton.jit
def guess_range(
    logits, block_max, blocks, lowest, top, temperature, share, V, BLOCKS,
    WEIGHTED: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Return a range of ordered bits where the cutoff probably lies, with at most CAPACITY tokens.

    Each pass cuts the range into quarters. Masses are in float32: they only guess.
    """
    low, high = lowest, top
    n_low, n_high = V + CAPACITY, 0
    goal = share
    passes = 0
    inverse = (1.0 / temperature).to(tl.float32)
    while (n_low - n_high > CAPACITY) & (passes < MAX_GUESSES) & (low < high):
        count = list_blocks(block_max, blocks, ordered_bits(low), BLOCKS, SIZE)
        quarter = (high - low) * 0.25
        at1, at2, at3 = low + quarter, low + 2.0 * quarter, low + 3.0 * quarter
        none = tl.zeros((TILE,), tl.int32)
        n0, n1, n2, n3 = none, none, none, none
        zero = tl.zeros((TILE,), tl.float32)
        s0, s1, s2, s3 = zero, zero, zero, zero
        for first in range(0, count, TILE // BN):
            column, is_column = columns_of(blocks, first, count, V, BN, TILE)
            z = tl.load(logits + column, mask=is_column, other=float("-inf"))
            in0, in1, in2, in3 = (z >= low) & is_column, z >= at1, z >= at2, z >= at3
            n0 += in0.to(tl.int32)
            n1 += in1.to(tl.int32)
            n2 += in2.to(tl.int32)
            n3 += in3.to(tl.int32)
            if WEIGHTED:
                mass = exp((z - top) * inverse)
                s0 += tl.where(in0, mass, 0.0)
                s1 += tl.where(in1, mass, 0.0)
                s2 += tl.where(in2, mass, 0.0)
                s3 += tl.where(in3, mass, 0.0)
        c0, c1, c2, c3 = tl.sum(n0, 0), tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)
        if WEIGHTED:
            if passes == 0:
                goal = share * tl.sum(s0, 0)
            is1, is2, is3 = tl.sum(s1, 0) >= goal, tl.sum(s2, 0) >= goal, tl.sum(s3, 0) >= goal
        else:
            is1, is2, is3 = c1 >= goal, c2 >= goal, c3 >= goal
        n_low = tl.where(is3, c3, tl.where(is2, c2, tl.where(is1, c1, c0)))
        n_high = tl.where(is3, n_high, tl.where(is2, c3, tl.where(is1, c2, c1)))
        high = tl.where(is3, high, tl.where(is2, at3, tl.where(is1, at2, at1)))
        low = tl.where(is3, at3, tl.where(is2, at2, tl.where(is1, at1, low)))
        passes += 1
    high_bits = ordered_bits(high)
    return ordered_bits(low), tl.where(high == top, high_bits + 1, high_bits)


@triton.jit
def list_range(
    logits, block_max, blocks, listed, listed_masses, kept_from, low, high, largest, temperature,
    V, BLOCKS,
    WEIGHTED: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """List the tokens from `low` to below `high` with their masses, as far as they fit.

    Returns:
        The mass of all tokens from `kept_from` on, of those from `high` on, and of those listed;
        the numbers of the last two. Without WEIGHTED a mass is 1, and the first is not complete.
    """
    visited = low
    if WEIGHTED:
        # Tokens below have no mass.
        massless = ceil_bits(largest + temperature * (MIN_EXPONENT - 1.0))
        visited = tl.minimum(low, tl.maximum(kept_from, massless))
    count = list_blocks(block_max, blocks, visited, BLOCKS, SIZE)
    total = tl.zeros((TILE,), tl.int64)
    above, inside = total, total
    n_above = tl.zeros((TILE,), tl.int32)
    filled = 0
    for first in range(0, count, TILE // BN):
        column, is_column = columns_of(blocks, first, count, V, BN, TILE)
        z = tl.load(logits + column, mask=is_column, other=float("-inf"))
        bits = ordered_bits(z)
        is_above = is_column & (bits >= high)
        is_inside = is_column & (bits >= low) & (bits < high)
        n_above += is_above.to(tl.int32)
        place = filled + tl.cumsum(is_inside.to(tl.int32), axis=0) - 1
        is_stored = is_inside & (place < CAPACITY)
        tl.store(listed + place, bits, mask=is_stored)
        if WEIGHTED:
            mass = masses((z.to(tl.float64) - largest) / temperature, BITS)
            mass = tl.where(is_column & (bits >= kept_from), mass, 0)
            total += mass
            above += tl.where(is_above, mass, 0)
            inside += tl.where(is_inside, mass, 0)
            tl.store(listed_masses + place, mass, mask=is_stored)
        filled += tl.sum(is_inside.to(tl.int32), axis=0)
    tl.debug_barrier()
    if not WEIGHTED:
        above += n_above
    n_above = tl.sum(n_above, axis=0)
    mass_inside = tl.sum(inside, axis=0)
    if not WEIGHTED:
        mass_inside += filled
    return tl.sum(total, axis=0), tl.sum(above, axis=0), mass_inside, n_above, filled


@triton.jit
def listed_mass(listed, listed_masses, count, bound, WEIGHTED: tl.constexpr, TILE: tl.constexpr):
    """Return the mass of the listed tokens from a bound on."""
    found = tl.zeros((TILE,), tl.int64)
    for first in range(0, count, TILE):
        i = first + tl.arange(0, TILE)
        bits = tl.load(listed + i, mask=i < count, other=-LARGEST_INT32)
        if WEIGHTED:
            mass = tl.load(listed_masses + i, mask=i < count, other=0)
            found += tl.where(bits >= bound, mass, 0)
        else:
            found += (bits >= bound).to(tl.int64)
    return tl.sum(found, axis=0)


@triton.jit
def holds(KIND: tl.constexpr, bound, mass, limit, logit, own, total, temperature, log_odds):
    """Return whether the condition holds at a bound from which on the tokens have this mass."""
    if KIND == CUT:
        result = mass.to(tl.float64) < limit
    elif KIND == KEPT:
        result = distance(mass - own, total, temperature, log_odds) > logit - value_of(bound)
    else:
        result = -distance(mass, total, temperature, log_odds) <= value_of(bound - 1) - logit
    return result


@triton.jit
def search(
    logits, block_max, blocks, listed, listed_masses,
    kept_from, low, high, guess_low, guess_high, share, logit, own, total,
    list_low, list_high, base, count, largest, temperature, log_odds, V, BLOCKS,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Return the smallest bound in low + 1 .. high for which the condition holds.

    That it holds at `high` is not tested; `low` is returned where it holds there.

        kept_from              tokens below have no mass; ordered bits, as all bounds
        guess_low, guess_high  the range that the first pass lists
        share                  the limit of CUT is this part of the total; k without WEIGHTED
        logit, own             of the token, and its mass, for KEPT and OUTSIDE
        total                  mass of all tokens; CUT computes it
        list_low, list_high    the listed tokens: from the first to below the second,
        base, count            the mass of those above, and their number

    Returns:
        The bound, the mass from there on, that from the bound before on, the total, and what is
        listed now.
    """
    limit = share
    if WEIGHTED:
        limit = share * total.to(tl.float64)
    mass_low, mass_high = total, total * 0
    n_low, n_high = V, 0
    is_open = (low < list_low) | (high > list_high)
    if is_open == 0:
        mass_high = base + listed_mass(listed, listed_masses, count, high, WEIGHTED, TILE)
        mass_low = base + listed_mass(listed, listed_masses, count, low, WEIGHTED, TILE)
        if holds(KIND, low, mass_low, limit, logit, own, total, temperature, log_odds):
            high = low
            mass_high = mass_low
    while is_open & (low < high):
        found, base, inside, n_above, count = list_range(
            logits, block_max, blocks, listed, listed_masses, kept_from, guess_low, guess_high,
            largest, temperature, V, BLOCKS, WEIGHTED, BITS, BN, SIZE, TILE, CAPACITY,
        )  # fmt: skip
        if KIND == CUT and WEIGHTED:
            total = found
            limit = share * total.to(tl.float64)
        mass_guess = base + inside
        at_low = holds(KIND, guess_low, mass_guess, limit, logit, own, total, temperature, log_odds)
        at_high = holds(KIND, guess_high, base, limit, logit, own, total, temperature, log_odds)
        is_inside = at_high & (at_low == 0)
        n_guess = n_above + count
        fits = count <= CAPACITY
        is_open = (is_inside & (fits | (guess_low + 1 >= guess_high))) == 0
        mass_high = tl.where(guess_high == high, base, mass_high)
        mass_high = tl.where(at_high, tl.where(at_low, mass_guess, base), mass_high)
        mass_low = tl.where(at_high, tl.where(at_low, mass_low, mass_guess), base)
        n_high = tl.where(at_high, tl.where(at_low, n_guess, n_above), n_high)
        n_low = tl.where(at_high, tl.where(at_low, n_low, n_guess), n_above)
        high = tl.where(at_high, tl.where(at_low, guess_low, guess_high), high)
        low = tl.where(at_high, tl.where(at_low, low, guess_low), guess_high)
        # A list that is cut off covers nothing.
        list_low, list_high = tl.where(fits, guess_low, guess_high), guess_high
        count = tl.where(fits, count, 0)
        is_all = (n_low - n_high <= CAPACITY) | (low + 1 >= high)
        middle = halfway(low, high)
        guess_low, guess_high = tl.where(is_all, low, middle), tl.where(is_all, high, middle)
    while low + 1 < high:
        middle = halfway(low, high)
        mass = base + listed_mass(listed, listed_masses, count, middle, WEIGHTED, TILE)
        if holds(KIND, middle, mass, limit, logit, own, total, temperature, log_odds):
            high = middle
            mass_high = mass
        else:
            low = middle
            mass_low = mass
    return high, mass_high, mass_low, total, list_low, list_high, base, count
