// Products of int16 pairs with AVX2.

#pragma once

#include "uint32_vec.h"

namespace gptbatch {

#ifdef CPU_CAPABILITY_AVX2
// Per lane: a.low * b.low + a.high * b.high of the 16-bit halves.
inline Uint32Vec multiply_add_pairs(const Uint32Vec& a, const Uint32Vec& b) {
  return (Uint32Vec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}

inline Vec int32_to_float(const Uint32Vec& integers) {
  return _mm256_cvtepi32_ps((__m256i)integers);
}
#endif

}  // namespace gptbatch
