// The K step of the GEMM in bfloat16, by the dot product of pairs (AVX512_BF16).
//
//     sum[lane] += x[k] * panel[k][lane] + x[k + 1] * panel[k + 1][lane]
//
// vdpbf16ps adds both products of a pair to the float32 sum, in an order that the instruction
// fixes. It rounds to nearest even, and subnormals count as 0. Pairs follow in ascending order, so
// the bits of a row do not depend on the number of rows.

#pragma once

#include "simd.h"

namespace gptbatch {

constexpr int64_t AVX512_BF16_K_STEP = 2;

#ifdef __AVX512BF16__
template <>
struct GemmStep<BFloat16> {
  static constexpr int64_t K_STEP = AVX512_BF16_K_STEP;
  static __m512i load(const BFloat16* weights) { return _mm512_loadu_si512(weights); }
  static __m512i broadcast(const BFloat16* x) {
    int pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Vec add(__m512i x, __m512i weights, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)weights);
  }
};
#endif

}  // namespace gptbatch
