"""Find where a condition on the tokens of one row begins to hold, without a sort.

    mass(b)    sum over the tokens whose logits have ordered bits of at least b
    holds(b)   false for small b, true for large b; by `mass(b)`

`search` returns the smallest b for which `holds` is true. That is

    COUNT      mass(b) < k                            below it lies the k-th largest logit
    CUT        mass(b) < top_p * total                below it lies the cutoff of top_p
    KEPT       h(mass(b) - own) > logit - b           reach of a kept token
    OUTSIDE    -h(mass(b)) <= (b - 1) - logit         reach of a token outside

In COUNT the mass of each token is 1. The cutoff is guessed first. One pass over the row adds the
exact masses above the guessed range and lists the tokens inside it, which shows whether the cutoff
is there. A bisection over the list finds it. A wrong guess costs more passes: they halve the range
until its tokens fit into the list. Masses are whole numbers, so that sums do not depend on an
order.

The kind is an argument, so that a kernel has each function once or twice: a pass of the compiler
takes time by about the cube of the code. KINDS tells which are possible: COUNT alone, COUNT and
CUT, or KEPT and OUTSIDE.

Pivots instead of a sort, and a buffer of likely tokens: Park et al., "Qrita" (vLLM's sampler), and
FlashInfer's sampling kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptbatch.pipeline.kernels.cuda.arithmetic import exp
from gptbatch.pipeline.kernels.cuda.masses import MIN_EXPONENT, distance, masses
from gptbatch.pipeline.kernels.cuda.state import TEMPERATURE, TOP_K, TOP_P
from gptbatch.pipeline.kernels.cuda.tokens import (
    LARGEST_INT32,
    ceil_bits,
    columns_of,
    halfway,
    list_blocks,
    ordered_bits,
    value_of,
)

COUNT, CUT, KEPT, OUTSIDE = (tl.constexpr(i) for i in range(4))
# Values of KINDS.
COUNTS, CUTOFFS, REACHES = (tl.constexpr(i) for i in range(3))
MAX_GUESSES = tl.constexpr(8)


@triton.jit
def guess_range(
    kind, logits, block_max, blocks, lowest, top, temperature, share, V, BLOCKS,
    KINDS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
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
        count = list_blocks(block_max, blocks, ordered_bits(low), BLOCKS, SIZE)[0]
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
            if KINDS != COUNTS:
                mass = tl.where(kind == COUNT, 1.0, exp((z - top) * inverse))
                s0 += tl.where(in0, mass, 0.0)
                s1 += tl.where(in1, mass, 0.0)
                s2 += tl.where(in2, mass, 0.0)
                s3 += tl.where(in3, mass, 0.0)
        c0, c1, c2, c3 = tl.sum(n0, 0), tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)
        if KINDS != COUNTS:
            if (passes == 0) & (kind != COUNT):
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
    kind, own, logits, block_max, blocks, listed, listed_masses, kept_from, low, high, top, V,
    BLOCKS, KINDS: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """List the tokens from `low` to below `high` with their masses, as far as they fit.

    Returns:
        The mass of all tokens from `kept_from` on, of those from `high` on, and of those listed;
        the numbers of the last two. For COUNT the first is not complete.
    """
    visited = low
    largest = top.to(tl.float64)
    temperature = tl.load(own + TEMPERATURE).to(tl.float64, bitcast=True)
    if KINDS != COUNTS:  # noqa: SIM102
        if kind != COUNT:
            # Tokens below have no mass.
            massless = ceil_bits(largest + temperature * (MIN_EXPONENT - 1.0))
            visited = tl.minimum(low, tl.maximum(kept_from, massless))
    count, _ = list_blocks(block_max, blocks, visited, BLOCKS, SIZE)
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
        if KINDS != COUNTS:
            is_kept = is_column & (bits >= kept_from)
            mass = is_kept.to(tl.int64)
            if kind != COUNT:
                mass = masses((z.to(tl.float64) - largest) / temperature, BITS)
                mass = tl.where(is_kept, mass, 0)
            total += mass
            above += tl.where(is_above, mass, 0)
            inside += tl.where(is_inside, mass, 0)
            tl.store(listed_masses + place, mass, mask=is_stored)
        filled += tl.sum(is_inside.to(tl.int32), axis=0)
    tl.debug_barrier()
    if KINDS == COUNTS:
        above += n_above
    n_above = tl.sum(n_above, axis=0)
    mass_inside = tl.sum(inside, axis=0)
    if KINDS == COUNTS:
        mass_inside += filled
    return tl.sum(total, axis=0), tl.sum(above, axis=0), mass_inside, n_above, filled


@triton.jit
def listed_mass(listed, listed_masses, count, bound, KINDS: tl.constexpr, TILE: tl.constexpr):
    """Return the mass of the listed tokens from a bound on."""
    found = tl.zeros((TILE,), tl.int64)
    for first in range(0, count, TILE):
        i = first + tl.arange(0, TILE)
        bits = tl.load(listed + i, mask=i < count, other=-LARGEST_INT32)
        if KINDS != COUNTS:
            mass = tl.load(listed_masses + i, mask=i < count, other=0)
            found += tl.where(bits >= bound, mass, 0)
        else:
            found += (bits >= bound).to(tl.int64)
    return tl.sum(found, axis=0)


@triton.jit
def holds(kind, own, bound, mass, logit, own_mass, total, log_odds, KINDS: tl.constexpr):
    """Return whether the condition holds at a bound from which on the tokens have this mass."""
    # Settings are loaded each time, to hold fewer registers.
    if KINDS == REACHES:
        temperature = tl.load(own + TEMPERATURE).to(tl.float64, bitcast=True)
        moves = distance(mass - own_mass, total, temperature, log_odds)
        if kind == KEPT:
            result = moves > logit - value_of(bound)
        else:
            result = -moves <= value_of(bound - 1) - logit
    else:
        result = mass < tl.load(own + TOP_K)
        if KINDS == CUTOFFS:  # noqa: SIM102
            if kind == CUT:
                top_p = tl.load(own + TOP_P).to(tl.float64, bitcast=True)
                result = mass.to(tl.float64) < top_p * total.to(tl.float64)
    return result


@triton.jit
def search(
    kind, own, logits, block_max, blocks, listed, listed_masses,
    kept_from, low, high, guess_low, guess_high, logit, own_mass, total,
    list_low, list_high, base, count, top, log_odds, V, BLOCKS,
    KINDS: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Return the smallest bound in low + 1 .. high for which the condition holds.

    That it holds at `high` is not tested; `low` is returned where it holds there.

        kept_from              tokens below have no mass; ordered bits, as all bounds
        guess_low, guess_high  the range that the first pass lists
        logit, own_mass        of the token, for KEPT and OUTSIDE; own_mass is 0 for OUTSIDE
        total                  mass of all tokens; computed where the list does not cover the range
        list_low, list_high    the listed tokens: from the first to below the second,
        base, count            the mass of those above, and their number

    Returns:
        The bound; the mass from the bound before on, or for KEPT from the bound on; the total; what
        is listed now.
    """
    n_low, n_high = V, 0
    is_open = (low < list_low) | (high > list_high)
    # The bisection tells whether it holds at `low`, too.
    low = tl.where(is_open, low, low - 1)
    while is_open & (low < high):
        total, base, inside, n_above, count = list_range(
            kind, own, logits, block_max, blocks, listed, listed_masses, kept_from, guess_low,
            guess_high, top, V, BLOCKS, KINDS, BITS, BN, SIZE, TILE, CAPACITY,
        )  # fmt: skip
        at_high = holds(kind, own, guess_high, base, logit, own_mass, total, log_odds, KINDS)
        at_low = holds(kind, own, guess_low, base + inside, logit, own_mass, total, log_odds, KINDS)
        n_guess = n_above + count
        if (count > CAPACITY) & (guess_low + 1 >= guess_high):
            # Tokens of one logit are listed as one.
            count = 1
            if KINDS != COUNTS:
                tl.store(listed_masses, inside)
                tl.debug_barrier()
            else:
                base += inside - 1
        fits = count <= CAPACITY
        is_open = (at_high & (at_low == 0) & fits) == 0
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
    mass = base
    is_open = low <= high
    while is_open:
        is_open = low + 1 < high
        middle = tl.where(is_open, halfway(low, high), high - (kind != KEPT).to(tl.int32))
        mass = base + listed_mass(listed, listed_masses, count, middle, KINDS, TILE)
        if is_open:
            if holds(kind, own, middle, mass, logit, own_mass, total, log_odds, KINDS):
                high = middle
            else:
                low = middle
    return high, mass, total, list_low, list_high, base, count
