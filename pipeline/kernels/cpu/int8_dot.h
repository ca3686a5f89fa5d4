// Dot products of int8 (keys or values, from the cache) with 16-bit integers (queries or weights),
// four at a time.
//
//     SplitInt16  16-bit integers in groups of four. A group is split over two 32-bit words, which
//                 `first` and `second` point to: its high and its low bytes (int8_dot_vnni.h), or
//                 its even and its odd places (int8_dot_pairs.h)
//     Int8Dot     int32 sums per lane
//
// The cache stores an int8 as a byte plus 128. Naive code that computes the same:
//
//     for (i = 0; i < 4; i++) sum[lane] += (byte[lane][i] - 128) * int16[i];
//
// Sums of integers are exact, in any order.

#pragma once

#include "simd.h"

namespace gptbatch {

// The largest query or weight: below 2^15 - 1, because it is split into two signed bytes of at most
// 127 each. 127 * 257 = 127 * 256 + 127.
constexpr int32_t INT16_MAX_VALUE = INT8_MAX_VALUE * 257;

inline Uint32Vec load_uint32(const void* from) {
  Uint32Vec lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

inline Uint32Vec broadcast_uint32(int32_t value) {
  return Uint32Vec{} + static_cast<uint32_t>(value);
}

// Converts an integer in float32; NaN becomes 0. A NaN scale then makes the result NaN.
inline int32_t to_int(float whole) {
  return whole == whole ? static_cast<int32_t>(whole) : 0;
}

}  // namespace gptbatch

#ifdef __AVX512VNNI__
#include "int8_dot_vnni.h"
#else
#include "int8_dot_pairs.h"
#endif
