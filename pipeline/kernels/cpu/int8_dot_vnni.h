// int8_dot.h with AVX512_VNNI: vpdpbusd multiplies four bytes per lane.
//
//     first   the high bytes of four integers: int16 = 256 * high + low, both signed
//     second  the low bytes
//     total   256 * sum(byte * high) + sum(byte * low) - 128 * sum(int16)

#pragma once

namespace gptbatch {

struct SplitInt16 {
  int32_t* first;
  int32_t* second;

  // Puts LANES integers at places i to i + LANES - 1; i is a multiple of 4.
  void put(int64_t i, Vec integers) const {
    const __m512i int16 = _mm512_cvtps_epi32(integers);
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(int16, _mm512_set1_epi32(128)), 8);
    const __m512i low = _mm512_sub_epi32(int16, _mm512_slli_epi32(high, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(first + i / 4), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(second + i / 4), _mm512_cvtepi32_epi8(low));
  }
};

struct Int8Dot {
  Uint32Vec high_sums, low_sums;

  void add(Uint32Vec bytes, Uint32Vec first, Uint32Vec second) {
    high_sums = (Uint32Vec)_mm512_dpbusd_epi32((__m512i)high_sums, (__m512i)bytes, (__m512i)first);
    low_sums = (Uint32Vec)_mm512_dpbusd_epi32((__m512i)low_sums, (__m512i)bytes, (__m512i)second);
  }

  // int16_sum: the sum of all 16-bit integers, to undo the 128 that was added to each byte.
  Vec total(int32_t int16_sum) const {
    return int32_to_float(high_sums * 256 + low_sums - 128 * static_cast<uint32_t>(int16_sum));
  }
};

}  // namespace gptbatch
