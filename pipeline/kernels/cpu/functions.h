// exp, tanh and erf in float32, and log in double, by + - * / and fused multiply-add alone.
//
// IEEE 754 fixes these operations to the last bit, so the results are equal on every CPU, whatever
// its vectors are. Functions of vector libraries differ between instruction sets.
// docs/arithmetic.md lists the formulas and their errors; tests/test_arithmetic.py measures them.
//
// The coefficients are minimax fits, rounded to float32 one by one.

#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "simd.h"

namespace gptbatch {

// c[0] + c[1] x + c[2] x^2 + ..., by Horner's rule.
template <int N>
inline Vec polynomial(const float (&c)[N], Vec x) {
  Vec sum = broadcast(c[N - 1]);
  UNROLL
  for (int i = N - 2; i >= 0; i--) sum = multiply_add(sum, x, broadcast(c[i]));
  return sum;
}

// exp(x) for x <= 88.375, or NaN. Below -87.68 it is 0.
//
//     n = round(x / ln(2)), r = x - n ln(2), exp(x) = 2^n (1 + r + r^2 p(r))
//
// At n = -127 the bits of the scale are those of 0.
inline Vec exp_up_to_limit(Vec x) {
  constexpr float MIN_X = -88.0f;
  constexpr float INVERSE_LN2 = 1.44269502f, LN2_HIGH = 0.693147182f, LN2_LOW = -1.90465421e-9f;
  // The sum with it is rounded to a whole number, whose lowest 8 bits are those of n + 127.
  constexpr float ROUNDER = 12582912.0f + 127.0f;  // 1.5 * 2^23 + 127
  constexpr float COEFFICIENTS[] = {1.0f,          1.0f,          0.49999994f,  0.166665211f,
                                    0.0416682661f, 0.00836867746f, 0.00138207339f};
  const Vec inside = clamp_min(x, MIN_X);
  const Vec rounded = multiply_add(inside, broadcast(INVERSE_LN2), broadcast(ROUNDER));
  const Vec n = rounded - ROUNDER;
  const Vec high = multiply_add(n, broadcast(-LN2_HIGH), inside);
  const Vec r = multiply_add(n, broadcast(-LN2_LOW), high);
  return polynomial(COEFFICIENTS, r) * from_bits(to_bits(rounded) << 23);
}

// exp(x), but at most exp(88.375) = 2.4e38.
inline Vec exp_limited(Vec x) {
  constexpr float MAX_X = 88.375f;
  return exp_up_to_limit(clamp_max(x, MAX_X));
}

// exp(x) of one number, as exp_up_to_limit.
inline float exp_up_to_limit(float x) { return exp_up_to_limit(broadcast(x))[0]; }

// Absolute values of `size` with the signs of x.
inline Vec with_sign(Vec size, Vec x) {
  return from_bits((to_bits(size) & 0x7FFFFFFF) | (to_bits(x) & 0x80000000));
}

// tanh(x) = x + x^3 p(x^2), or 1 - 2 / (exp(2 |x|) + 1) from 0.625 on.
inline Vec tanh_of(Vec x) {
  constexpr float MIN_EXP = 0.625f;
  constexpr float COEFFICIENTS[] = {-0.333332807f, 0.133314088f, -0.0537370592f, 0.0206308626f,
                                    -0.00569625339f};
  const Vec size = absolute(x), square = x * x;
  const Vec small = multiply_add(polynomial(COEFFICIENTS, square), square * x, x);
  const Vec large = 1.0f - 2.0f / (exp_limited(2.0f * size) + 1.0f);
  return size < MIN_EXP ? small : with_sign(large, x);
}

// erf(x) = x + x p(x^2), or 1 - exp(|x| q(|x|)) from 0.921875 on; 1 from 4 on.
inline Vec erf_of(Vec x) {
  constexpr float MIN_EXP = 0.921875f, MAX_X = 4.0f;
  constexpr float SMALL[] = {0.128379166f,   -0.376126289f,   0.112836257f,  -0.0268557277f,
                             0.00519237714f, -0.000804917421f, 7.99279587e-05f};
  constexpr float LARGE[] = {-1.12864959f,    -0.635146856f,   -0.106244221f,  0.0237683542f,
                             -0.00364541402f, 0.000323524728f, -1.13025981e-05f};
  const Vec size = clamp_max(absolute(x), MAX_X);
  const Vec small = multiply_add(polynomial(SMALL, x * x), x, x);
  const Vec large = 1.0f - exp_up_to_limit(size * polynomial(LARGE, size));
  return size < MIN_EXP ? small : with_sign(large, x);
}

// log(x) of a normal number x > 0, by the formula and the constants of fdlibm (e_log.c, Sun
// Microsystems 1993), without branches:
//
//     x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), s = f / (2 + f)
//     log(1 + f) = f - (f^2 / 2 - s (f^2 / 2 + R)), R = s^2 p(s^2)
inline double log_of_normal(double x) {
  constexpr double LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
  constexpr double L1 = 6.666666666666735130e-01, L2 = 3.999999999940941908e-01,
                   L3 = 2.857142874366239149e-01, L4 = 2.222219843214978396e-01,
                   L5 = 1.818357216161805012e-01, L6 = 1.531383769920937332e-01,
                   L7 = 1.479819860511658591e-01;
  constexpr uint64_t ONE = 0x3FF0000000000000, SQRT_HALF = 0x3FE6A09E667F3BCD;
  // 1.5 * 2^52, whose lowest bits are a whole number.
  constexpr double ROUNDER = 6755399441055744.0;
  const uint64_t shifted = std::bit_cast<uint64_t>(x) + (ONE - SQRT_HALF);
  const double k = std::bit_cast<double>((shifted >> 52) + std::bit_cast<uint64_t>(ROUNDER)) -
                   (ROUNDER + 1023.0);
  const double f = std::bit_cast<double>((shifted & 0x000FFFFFFFFFFFFF) + SQRT_HALF) - 1.0;
  const double s = f / (2.0 + f), z = s * s, w = z * z;
  const double even = w * (L2 + w * (L4 + w * L6));
  const double odd = z * (L1 + w * (L3 + w * (L5 + w * L7)));
  const double half_square = 0.5 * f * f;
  return k * LN2_HIGH - ((half_square - (s * (half_square + (even + odd)) + k * LN2_LOW)) - f);
}

// log(x) of any x >= 0.
inline double log_of(double x) {
  constexpr double INFINITE = std::numeric_limits<double>::infinity();
  constexpr double TWO_54 = 18014398509481984.0, LN_2_54 = 37.42994775023705;
  if (x == 0.0) return -INFINITE;
  if (!(x < INFINITE)) return x;
  if (x < std::numeric_limits<double>::min()) return log_of_normal(x * TWO_54) - LN_2_54;
  return log_of_normal(x);
}

}  // namespace gptbatch
