// Products of int16 pairs with AVX2.

#pragma once

#include "int8_words.h"

namespace gptbatch {

#ifdef CPU_CAPABILITY_AVX2
// Per lane: a.low * b.low + a.high * b.high of the 16-bit halves.
inline Words multiply_add_pairs(const Words& a, const Words& b) {
  return (Words)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}

inline Vec words_to_float(const Words& words) { return _mm256_cvtepi32_ps((__m256i)words); }
#endif

}  // namespace gptbatch
