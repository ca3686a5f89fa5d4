// Products of int16 pairs with AVX-512.

#pragma once

#include "uint32_vec.h"

namespace gptbatch {

#ifdef CPU_CAPABILITY_AVX512
// Per lane: a.low * b.low + a.high * b.high of the 16-bit halves.
inline Uint32Vec multiply_add_pairs(const Uint32Vec& a, const Uint32Vec& b) {
  return (Uint32Vec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}

inline Vec int32_to_float(const Uint32Vec& integers) {
  return _mm512_cvtepi32_ps((__m512i)integers);
}
#endif

}  // namespace gptbatch
