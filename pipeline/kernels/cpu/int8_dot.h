// Dot products of int8 (from the cache) with finer integers (queries or weights), four at a time.
//
//     Fours     integers of up to FINE_MAX, four per 32-bit lane, spread over two words
//     Int8Dot   int32 sums per lane
//
// The cache stores an int8 as a byte plus 128. Naive code that computes the same:
//
//     for (i = 0; i < 4; i++) sum[lane] += (byte[lane][i] - 128) * fine[i];
//
// Sums of integers are exact, in any order.

#pragma once

#include "int8_avx2.h"
#include "int8_avx512.h"
#include "int8_generic.h"

namespace gptbatch {

// 127 * 257 = 127 * 256 + 127 is the largest integer whose two signed bytes hold at most 127 each.
constexpr int32_t FINE_MAX = INT8_MAX_VALUE * 257;

}  // namespace gptbatch

#ifdef __AVX512VNNI__
#include "int8_dot_vnni.h"
#else
#include "int8_dot_pairs.h"
#endif
