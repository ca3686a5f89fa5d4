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

#include "int16_pairs_avx2.h"
#include "int16_pairs_avx512.h"
#include "int16_pairs_generic.h"

namespace gptbatch {

// The largest query or weight: below 2^15 - 1, because it is split into two signed bytes of at most
// 127 each. 127 * 257 = 127 * 256 + 127.
constexpr int32_t INT16_MAX_VALUE = INT8_MAX_VALUE * 257;

}  // namespace gptbatch

#ifdef __AVX512VNNI__
#include "int8_dot_vnni.h"
#else
#include "int8_dot_pairs.h"
#endif
