// Products of int16 pairs on CPUs without AVX2.

#pragma once

#include "int8_words.h"

namespace gptbatch {

#if !defined(CPU_CAPABILITY_AVX512) && !defined(CPU_CAPABILITY_AVX2)
// Per lane: a.low * b.low + a.high * b.high of the 16-bit halves; those of a are below 256.
inline Words multiply_add_pairs(const Words& a, const Words& b) {
  const auto sign_extend = [](uint32_t half) {
    return static_cast<uint32_t>(static_cast<int16_t>(half));
  };
  Words sums;
  for (int64_t i = 0; i < LANES; i++)
    sums[i] = (a[i] & 0xFFFF) * sign_extend(b[i]) + (a[i] >> 16) * sign_extend(b[i] >> 16);
  return sums;
}

inline Vec words_to_float(const Words& words) {
  float numbers[LANES];
  for (int64_t i = 0; i < LANES; i++)
    numbers[i] = static_cast<float>(static_cast<int32_t>(words[i]));
  return Vec::loadu(numbers);
}
#endif

}  // namespace gptbatch
