"""Float32 functions of the kernels, from + - * / and fma alone: equal bits wherever IEEE 754 holds.

`tl.exp` is an approximation of the GPU, and the order of `tl.sum` follows the layout and the
version of the compiler. The portable forms of the kernels use neither, but for sums over one warp
(norm.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)
# 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest whole number.
ROUNDING = tl.constexpr(12582912.0)
EXP_MIN = tl.constexpr(-87.0)
EXP_MAX = tl.constexpr(88.0)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def exp(x):
    """Compute e^x in float32 (Cephes' expf): 0 below -87, e^88 above 88, NaN for NaN."""
    clamped = tl.minimum(tl.maximum(x, EXP_MIN), EXP_MAX)
    n = tl.fma(clamped, LOG2_E, ROUNDING) - ROUNDING
    r = tl.fma(n, -LN2_HIGH, clamped)
    r = tl.fma(n, -LN2_LOW, r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    y = tl.fma(p, r * r, r) + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, tl.where(x < EXP_MIN, 0.0, y * power))


@triton.jit
def gelu_tanh(x):
    """Compute x * (1 + tanh(u)) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    u = tl.fma(x * GELU_CUBIC * x, x, x) * SQRT_2_OVER_PI
    return tl.div_rn(x, 1.0 + exp(u * -2.0))


@triton.jit
def tree_sum(x, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """Sum x (SIZE,) over a fixed tree: first x[i] + x[i + SIZE / 2]. SIZE = 2^LEVELS.

    The last tl.sum is over one element.
    """
    for level in tl.static_range(LEVELS):
        halves = tl.reshape(x, (2, SIZE >> (level + 1)))
        low, high = tl.split(tl.permute(halves, (1, 0)))
        x = low + high
    return tl.sum(x, axis=0)
