// int8_dot.h with AVX512_VNNI: vpdpbusd multiplies four bytes per lane.
//
//     first   the upper byte of four integers; second the lower: fine = 256 * upper + lower, signed
//     total   256 * sum(byte * upper) + sum(byte * lower) - 128 * sum(fine)

#pragma once

namespace gptbatch {

struct Fours {
  int32_t* first;
  int32_t* second;

  // Puts LANES numbers at places i to i + LANES - 1; i is a multiple of 4.
  void put(int64_t i, const Vec& numbers) const {
    const __m512i fine = _mm512_cvtps_epi32(numbers);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(fine, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(fine, _mm512_slli_epi32(high, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(first + i / 4), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(second + i / 4), _mm512_cvtepi32_epi8(low));
  }
};

struct Int8Dot {
  Words upper, lower;

  void add(const Words& bytes, const Words& four_upper, const Words& four_lower) {
    upper = (Words)_mm512_dpbusd_epi32((__m512i)upper, (__m512i)bytes, (__m512i)four_upper);
    lower = (Words)_mm512_dpbusd_epi32((__m512i)lower, (__m512i)bytes, (__m512i)four_lower);
  }

  // fine_sum: the sum of all fine numbers, to undo the 128 that was added to each byte.
  Vec total(int32_t fine_sum) const {
    return words_to_float(upper * 256 + lower - 128 * static_cast<uint32_t>(fine_sum));
  }
};

}  // namespace gptbatch
