"""Functions of docs/arithmetic.md from + - * / and fma alone, and its sum over 32 lanes.

Equal bits wherever IEEE 754 holds: `tl.exp` is an approximation of the GPU, and the order of
`tl.sum` follows the layout and the version of the compiler. Kernels that call these are launched
with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, GELU_TANH, GELU, RELU, SILU, TANH = (tl.constexpr(i) for i in range(6))
ACTIVATIONS = {
    "none": NONE.value,
    "gelu_tanh": GELU_TANH.value,
    "gelu": GELU.value,
    "relu": RELU.value,
    "silu": SILU.value,
    "tanh": TANH.value,
}

EXP_MIN, EXP_MAX = tl.constexpr(-88.0), tl.constexpr(88.375)
# 1.5 * 2^23 + 127: the lowest bits of x + this are round(x) + 127, the exponent of 2^round(x).
ROUNDER = tl.constexpr(12583039.0)
# Adding and subtracting it rounds to the nearest whole number.
WHOLE = tl.constexpr(12582912.0)
LN2_HIGH_64, LN2_LOW_64 = (
    tl.constexpr(6.93147180369123816490e-01),
    tl.constexpr(1.90821492927058770002e-10),
)
ONE_BITS, SQRT_HALF_BITS = tl.constexpr(0x3FF0000000000000), tl.constexpr(0x3FE6A09E667F3BCD)
FRACTION_BITS = tl.constexpr(0x000FFFFFFFFFFFFF)


@triton.jit
def exp(x):
    """Compute e^x in float32: 0 below -88, e^88.375 above 88.375, NaN for NaN."""
    inside = tl.minimum(tl.maximum(x, EXP_MIN), EXP_MAX)
    t = tl.fma(inside, 1.44269502, ROUNDER)
    n = t - ROUNDER
    r = tl.fma(n, 1.90465421e-9, tl.fma(n, -0.693147182, inside))
    p = tl.fma(r, 0.00138207339, 0.00836867746)
    p = tl.fma(p, r, 0.0416682661)
    p = tl.fma(p, r, 0.166665211)
    p = tl.fma(p, r, 0.49999994)
    p = tl.fma(p, r, 1.0)
    p = tl.fma(p, r, 1.0)
    power = (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, p * power)


@triton.jit
def tanh(x):
    """Compute the hyperbolic tangent in float32."""
    square = x * x
    p = tl.fma(square, -0.00569625339, 0.0206308626)
    p = tl.fma(p, square, -0.0537370592)
    p = tl.fma(p, square, 0.133314088)
    p = tl.fma(p, square, -0.333332807)
    small = tl.fma(p, square * x, x)
    size = tl.abs(x)
    large = 1.0 - tl.div_rn(x * 0.0 + 2.0, exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def erf(x):
    """Compute the error function in float32."""
    size = tl.minimum(tl.abs(x), 4.0)
    square = x * x
    p = tl.fma(square, 7.99279587e-5, -0.000804917421)
    p = tl.fma(p, square, 0.00519237714)
    p = tl.fma(p, square, -0.0268557277)
    p = tl.fma(p, square, 0.112836257)
    p = tl.fma(p, square, -0.376126289)
    p = tl.fma(p, square, 0.128379166)
    small = tl.fma(p, x, x)
    q = tl.fma(size, -1.13025981e-5, 0.000323524728)
    q = tl.fma(q, size, -0.00364541402)
    q = tl.fma(q, size, 0.0237683542)
    q = tl.fma(q, size, -0.106244221)
    q = tl.fma(q, size, -0.635146856)
    q = tl.fma(q, size, -1.12864959)
    large = 1.0 - exp(size * q)
    return tl.where(tl.abs(x) < 0.921875, small, tl.where(x < 0.0, -large, large))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply the activation of the MLP."""
    if ACTIVATION == GELU_TANH:
        z = 1.5957691216057308 * (x + ((0.044715 * x) * x) * x)
        x = tl.div_rn(x, 1.0 + exp(-z))
    elif ACTIVATION == GELU:
        x = (0.5 * x) * (1.0 + erf(x * 0.70710678))
    elif ACTIVATION == RELU:
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == SILU:
        x = tl.div_rn(x, 1.0 + exp(-x))
    elif ACTIVATION == TANH:
        x = tanh(x)
    return x


@triton.jit
def sum_lanes(lanes):
    """Add 32 lanes (32,): lane j and lane j + n, for n = 16, 8, 4, 2, 1."""
    for level in tl.static_range(5):
        halves = tl.reshape(lanes, (2, 16 >> level))
        low, high = tl.split(tl.permute(halves, (1, 0)))
        lanes = low + high
    # Over one element.
    return tl.sum(lanes, axis=0)


@triton.jit
def log(x):
    """Compute the logarithm of positive normal numbers in float64, as fdlibm."""
    shifted = x.to(tl.int64, bitcast=True) + (ONE_BITS - SQRT_HALF_BITS)
    k = ((shifted >> 52) - 1023).to(tl.float64)
    f = ((shifted & FRACTION_BITS) + SQRT_HALF_BITS).to(tl.float64, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (
        3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01)
    )
    odd = 1.818357216161805012e-01 + w * 1.479819860511658591e-01
    odd = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01 + w * odd))
    half = (0.5 * f) * f
    low = s * (half + (even + odd)) + k * LN2_LOW_64
    return k * LN2_HIGH_64 - ((half - low) - f)
