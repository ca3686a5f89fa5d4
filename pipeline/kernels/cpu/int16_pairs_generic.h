// Products of int16 pairs on CPUs without AVX2.

#pragma once

#include "uint32_vec.h"

namespace gptbatch {

#if !defined(CPU_CAPABILITY_AVX512) && !defined(CPU_CAPABILITY_AVX2)
// Per lane: a.low * b.low + a.high * b.high of the 16-bit halves; those of a are below 256.
inline Uint32Vec multiply_add_pairs(const Uint32Vec& a, const Uint32Vec& b) {
  const auto sign_extend = [](uint32_t half) {
    return static_cast<uint32_t>(static_cast<int16_t>(half));
  };
  Uint32Vec sums;
  for (int64_t i = 0; i < LANES; i++)
    sums[i] = (a[i] & 0xFFFF) * sign_extend(b[i]) + (a[i] >> 16) * sign_extend(b[i] >> 16);
  return sums;
}

inline Vec int32_to_float(const Uint32Vec& integers) {
  float values[LANES];
  for (int64_t i = 0; i < LANES; i++)
    values[i] = static_cast<float>(static_cast<int32_t>(integers[i]));
  return Vec::loadu(values);
}
#endif

}  // namespace gptbatch
