// simd.h with AVX-512.

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>

namespace gptbatch {

inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

inline Vec round_to_integer(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline float sum_lanes(Vec lanes) {
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline float max_lanes(Vec lanes) {
  const bool has_nan = _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q) != 0;
  return has_nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(lanes);
}

inline Uint32Vec widen(const uint16_t* from) {
  return (Uint32Vec)_mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline Uint32Vec multiply_add_pairs(Uint32Vec a, Uint32Vec b) {
  return (Uint32Vec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
}

}  // namespace gptbatch
#endif
