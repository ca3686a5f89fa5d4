"""Masses of tokens as whole numbers, and the distance h of a mass; see `engine/nucleus.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from gptbatch.pipeline.kernels.cuda.arithmetic import log

# exp of less has no mass.
MIN_EXPONENT = tl.constexpr(-33.0)
INVERSE_LN2 = tl.constexpr(1.4426950408889634)
# ln 2 in two parts, the first of which has 21 zero bits at its end.
LN2_HIGH, LN2_LOW = tl.constexpr(0.6931471803691238), tl.constexpr(1.9082149292705877e-10)
# 1.5 * 2^52: adding it rounds to a whole number, half to even, which is then in the lowest bits.
ROUNDER, ROUNDER_BITS = tl.constexpr(6755399441055744.0), tl.constexpr(0x4338000000000000)
# 1 / k! of k = 13 down to 0.
COEFFICIENTS = tl.constexpr(
    (
        *(1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0),
        *(1 / 40320.0, 1 / 5040.0, 1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 0.5, 1.0, 1.0),
    )
)


def mass_bits(vocab_size: int) -> int:
    """Return the bits of the mass of the most likely token: sums stay below 2^63."""
    return 46 if vocab_size <= 2**16 else 40


@triton.jit
def masses(x, BITS: tl.constexpr):
    """Return rint(exp(x) * 2^BITS) as int64, x <= 0 in float64; 0 below MIN_EXPONENT."""
    inside = tl.maximum(x, MIN_EXPONENT)
    shifted = inside * INVERSE_LN2 + ROUNDER
    n = shifted - ROUNDER
    r = (inside - n * LN2_HIGH) - n * LN2_LOW
    total = r * 0.0 + COEFFICIENTS[0]
    for k in tl.static_range(1, 14):
        total = total * r + COEFFICIENTS[k]
    exponent = shifted.to(tl.int64, bitcast=True) - ROUNDER_BITS
    scale = ((exponent + (BITS + 1023)) << 52).to(tl.float64, bitcast=True)
    return (total * scale + ROUNDER).to(tl.int64, bitcast=True) - ROUNDER_BITS


@triton.jit
def distance(mass, total, temperature, log_odds):
    """Return h: how far logits move until tokens of this mass hold top_p of the total."""
    rest = total - mass
    ln = log(tl.maximum(mass, 1).to(tl.float64) / tl.maximum(rest, 1).to(tl.float64))
    ln = tl.where(mass == 0, float("-inf"), tl.where(rest == 0, float("inf"), ln))
    return temperature * (log_odds - ln)
