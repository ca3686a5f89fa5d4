// Products of int16 pairs with AVX-512.

#pragma once

#include "int8_words.h"

namespace gptbatch {

#ifdef CPU_CAPABILITY_AVX512
// Per lane: a.low * b.low + a.high * b.high of the 16-bit halves.
inline Words multiply_add_pairs(const Words& a, const Words& b) {
  return (Words)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}

inline Vec words_to_float(const Words& words) { return _mm512_cvtepi32_ps((__m512i)words); }
#endif

}  // namespace gptbatch
