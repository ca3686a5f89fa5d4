// simd.h without AVX2: loops over the lanes.
//
// Compilers turn them into vector instructions where the CPU has them: on aarch64, all of them.

#pragma once

#ifndef __AVX2__

namespace gptbatch {

// Without the instruction, it is long: one copy, not one for each vector of an unrolled loop.
#if !defined(__FMA__) && !defined(__aarch64__)
__attribute__((noinline))
#endif
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  Vec sum{};
  for (int64_t i = 0; i < LANES; i++) sum[i] = multiply_add(a[i], b[i], c[i]);
  return sum;
}

inline Vec round_to_integer(Vec x) {
  Vec whole{};
  for (int64_t i = 0; i < LANES; i++) whole[i] = std::nearbyint(x[i]);
  return whole;
}

inline float sum_lanes(Vec lanes) {
  for (int64_t n = LANES / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; i++) lanes[i] = lanes[i] + lanes[i + n];
  return lanes[0];
}

inline float max_lanes(Vec lanes) {
  float max = lanes[0];
  for (int64_t i = 1; i < LANES; i++)
    if (!(lanes[i] <= max)) max = std::isnan(max) ? max : lanes[i];
  return max;
}

inline Uint32Vec widen(const uint16_t* from) {
  Uint32Vec integers{};
  for (int64_t i = 0; i < LANES; i++) integers[i] = from[i];
  return integers;
}

inline Uint32Vec multiply_add_pairs(Uint32Vec a, Uint32Vec b) {
  const Int32Vec pair = std::bit_cast<Int32Vec>(b);
  return (a & 0xFFFF) * std::bit_cast<Uint32Vec>((pair << 16) >> 16) +
         (a >> 16) * std::bit_cast<Uint32Vec>(pair >> 16);
}

}  // namespace gptbatch
#endif
