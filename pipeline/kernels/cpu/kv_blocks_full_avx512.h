// Loads and stores of bfloat16 KV blocks with AVX-512.

#pragma once

#include "simd.h"

namespace gptbatch {

#ifdef CPU_CAPABILITY_AVX512
// 32 bfloat16 as float32: those at even places, then those at odd places. That takes two shifts and
// no shuffle; store_even_odd restores the order.
inline std::tuple<Vec, Vec> load_even_odd(const BFloat16* from) {
  const __m512i both = _mm512_loadu_si512(from);
  const __m512i even = _mm512_slli_epi32(both, 16);
  const __m512i odd = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
  return {_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)};
}

inline void store_even_odd(const Vec& even, const Vec& odd, float* to) {
  const __m512i low =
      _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, low, odd));
  _mm512_storeu_ps(to + LANES, _mm512_permutex2var_ps(even, high, odd));
}
#endif

#ifdef __AVX512BF16__
// sum[lane] += query[0] * keys[lane][0] + query[1] * keys[lane][1], for 16 positions.
inline __m512 add_pair_products(__m512 sum, const BFloat16* query, __m512i keys) {
  int pair;
  __builtin_memcpy(&pair, query, sizeof(pair));
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)keys);
}
#endif

}  // namespace gptbatch
