// Loads and stores of bfloat16 KV blocks with AVX-512.

#pragma once

#include "simd.h"

namespace gptbatch {

#ifdef __AVX512F__
// 32 bfloat16 as float32: those at even places, then those at odd places. That takes two shifts and
// no shuffle; store_even_odd restores the order.
inline void load_even_odd(const BFloat16* from, Vec& even, Vec& odd) {
  Uint32Vec both;
  std::memcpy(&both, from, sizeof(both));
  even = from_bits(both << 16);
  odd = from_bits(both & 0xFFFF0000);
}

inline void store_even_odd(float* to, Vec even, Vec odd) {
  const __m512i low =
      _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, low, odd));
  _mm512_storeu_ps(to + LANES, _mm512_permutex2var_ps(even, high, odd));
}
#endif

#ifdef __AVX512BF16__
// sum[lane] += query[0] * keys[lane][0] + query[1] * keys[lane][1], for 16 positions.
inline Vec add_pair_products(Vec sum, const BFloat16* query, __m512i keys) {
  int pair;
  __builtin_memcpy(&pair, query, sizeof(pair));
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)keys);
}
#endif

}  // namespace gptbatch
