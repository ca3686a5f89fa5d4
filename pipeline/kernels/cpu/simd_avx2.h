// simd.h with AVX2 and FMA.

#pragma once

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>

namespace gptbatch {

inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

inline Vec round_to_integer(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline float sum_lanes(Vec lanes) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline float max_lanes(Vec lanes) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  const float max = _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
  const bool has_nan = _mm256_movemask_ps(_mm256_cmp_ps(lanes, lanes, _CMP_UNORD_Q)) != 0;
  return has_nan ? std::numeric_limits<float>::quiet_NaN() : max;
}

inline Uint32Vec widen(const uint16_t* from) {
  return (Uint32Vec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline Uint32Vec multiply_add_pairs(Uint32Vec a, Uint32Vec b) {
  return (Uint32Vec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}

}  // namespace gptbatch
#endif
