// Masses of tokens: rint(exp(x) * 2^bits) as whole numbers, whose sums do not depend on an order.
//
// pipeline/engine/nucleus.py defines them. exp is computed by + and * alone, so that its bits are
// equal on every CPU.

#pragma once

#include <bit>
#include <cstdint>

#include "simd.h"

namespace gptbatch {

// 2^16 masses of 2^46 have a sum below 2^63.
constexpr int64_t LARGE_VOCAB = 1 << 16;
constexpr int mass_bits(int64_t vocab_size) { return vocab_size <= LARGE_VOCAB ? 46 : 40; }

constexpr int MASS_CHUNK = 64;
// exp of less has no mass.
constexpr double MIN_MASS_EXPONENT = -33.0;

// The masses of MASS_CHUNK numbers x <= 0.
inline void masses_of(const double* x, int bits, int64_t* masses) {
  typedef double Doubles __attribute__((vector_size(sizeof(Vec))));
  constexpr int DOUBLES = sizeof(Doubles) / sizeof(double);
  constexpr double LN2_HIGH = 0.6931471803691238, LN2_LOW = 1.9082149292705877e-10;
  constexpr double INVERSE_LN2 = 1.4426950408889634;
  // Adding it rounds to a whole number, half to even, which is then in the lowest bits.
  constexpr double ROUNDER = 6755399441055744.0;  // 1.5 * 2^52
  constexpr int DEGREE = 13;
  constexpr double COEFFICIENTS[DEGREE + 1] = {
      1.0,             1.0,              1.0 / 2.0,         1.0 / 6.0,         1.0 / 24.0,
      1.0 / 120.0,     1.0 / 720.0,      1.0 / 5040.0,      1.0 / 40320.0,     1.0 / 362880.0,
      1.0 / 3628800.0, 1.0 / 39916800.0, 1.0 / 479001600.0, 1.0 / 6227020800.0};
  double shifted[MASS_CHUNK], sums[MASS_CHUNK];
  // Independent sums hide the latency of + and *.
  constexpr int AT_ONCE = 4, STEP = AT_ONCE * DOUBLES;
  static_assert(MASS_CHUNK % STEP == 0);
  for (int first = 0; first < MASS_CHUNK; first += STEP) {
    Doubles r[AT_ONCE], sum[AT_ONCE];
    UNROLL
    for (int j = 0; j < AT_ONCE; j++) {
      const int i = first + j * DOUBLES;
      Doubles inside;
      std::memcpy(&inside, x + i, sizeof(inside));
      inside = inside < MIN_MASS_EXPONENT ? Doubles{} + MIN_MASS_EXPONENT : inside;
      const Doubles rounded = inside * INVERSE_LN2 + ROUNDER;
      const Doubles n = rounded - ROUNDER;
      r[j] = (inside - n * LN2_HIGH) - n * LN2_LOW;
      sum[j] = Doubles{} + COEFFICIENTS[DEGREE];
      std::memcpy(shifted + i, &rounded, sizeof(rounded));
    }
    UNROLL
    for (int k = DEGREE - 1; k >= 0; k--)
      UNROLL
      for (int j = 0; j < AT_ONCE; j++) sum[j] = sum[j] * r[j] + COEFFICIENTS[k];
    UNROLL
    for (int j = 0; j < AT_ONCE; j++)
      std::memcpy(sums + first + j * DOUBLES, &sum[j], sizeof(sum[j]));
  }
  for (int i = 0; i < MASS_CHUNK; i++) {
    const int64_t exponent = std::bit_cast<int64_t>(shifted[i]) - std::bit_cast<int64_t>(ROUNDER);
    const double scale =
        std::bit_cast<double>(static_cast<uint64_t>(exponent + bits + 1023) << 52);
    masses[i] =
        std::bit_cast<int64_t>(sums[i] * scale + ROUNDER) - std::bit_cast<int64_t>(ROUNDER);
  }
}

}  // namespace gptbatch
