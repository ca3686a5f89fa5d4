"""The natural logarithm of docs/arithmetic.md, whose bits do not depend on the C library.

It is that of pipeline/kernels/cpu/functions.h. `math.log` may differ in the last bit between C
libraries, and between CPUs with one library.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

# The constants of fdlibm (e_log.c, Sun Microsystems 1993).
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_L1, _L2, _L3, _L4, _L5, _L6, _L7 = (
    *(6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01),
    *(2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01),
    1.479819860511658591e-01,
)
_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")


def log(x: float) -> float:
    """Return ln(x) of a finite number x > 0."""
    fraction, exponent = math.frexp(x)
    if fraction < _SQRT_HALF:
        fraction, exponent = 2 * fraction, exponent - 1
    f, k = fraction - 1, float(exponent)
    s = f / (2 + f)
    z = s * s
    w = z * z
    even = w * (_L2 + w * (_L4 + w * _L6))
    odd = z * (_L1 + w * (_L3 + w * (_L5 + w * _L7)))
    half_square = 0.5 * f * f
    return k * _LN2_HIGH - ((half_square - (s * (half_square + (even + odd)) + k * _LN2_LOW)) - f)


def logs(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ln(x) of finite numbers x > 0, with the bits of `log`."""
    fraction, exponent = np.frexp(x)
    is_small = fraction < _SQRT_HALF
    f = np.where(is_small, 2 * fraction, fraction) - 1
    k = (exponent - is_small).astype(np.float64)
    s = f / (2 + f)
    z = s * s
    w = z * z
    even = w * (_L2 + w * (_L4 + w * _L6))
    odd = z * (_L1 + w * (_L3 + w * (_L5 + w * _L7)))
    half_square = 0.5 * f * f
    low = s * (half_square + (even + odd)) + k * _LN2_LOW
    result: npt.NDArray[np.float64] = k * _LN2_HIGH - ((half_square - low) - f)
    return result
