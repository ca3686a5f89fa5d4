// Vectors of float32, and loops unrolled at compile time.
//
// No sum may depend on the number of lanes of a vector: LogicalLanes sums in 32 lanes on every CPU.
// docs/arithmetic.md lists the order of every sum.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace gptbatch {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();

// The compiler's own vector type. GCC does not always keep arrays of a class in registers.
#if defined(CPU_CAPABILITY_AVX512)
using Register = __m512;
#elif defined(CPU_CAPABILITY_AVX2)
using Register = __m256;
#else
using Register = Vec;
#endif

// a * b + c, rounded once.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  // The product is exact in double. The sum is rounded to odd (Boldo and Melquiond 2008): if it is
  // not exact, its last bit becomes 1. Rounding it again to float32 then gives the right result.
  const double product = static_cast<double>(a) * b, sum = product + c;
  // With a 1 in these bits, it is no midpoint between two float32, and rounds right as it is.
  constexpr uint64_t BELOW_MIDPOINTS = (1 << 28) - 1;
  const uint64_t bits = std::bit_cast<uint64_t>(sum);
  if ((bits & BELOW_MIDPOINTS) != 0) return static_cast<float>(sum);
  const double addend = sum - product;
  const double error = (product - (sum - addend)) + (c - addend);
  // NaN where the sum is not finite.
  if (!(error < 0.0 || error > 0.0)) return static_cast<float>(sum);
  const uint64_t odd = (error > 0.0) == (sum > 0.0) ? bits + 1 : bits - 1;
  return static_cast<float>(std::bit_cast<double>(odd));
#endif
}

inline Register multiply_add(Register a, Register b, Register c) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
  return at::vec::fmadd(Vec(a), Vec(b), Vec(c));
#else
  // fmadd of at::vec rounds twice here.
  Vec sum;
  for (int i = 0; i < LANES; i++) sum[i] = multiply_add(a[i], b[i], c[i]);
  return sum;
#endif
}

// Calls body(0), ..., body(N - 1) with compile-time indices. An array stays in registers only if
// no loop over it is left. The calling function must be FLAT: all its calls are inlined.
template <int N, class F>
inline void unroll(const F& body) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}
#define FLAT __attribute__((flatten))

// Unrolls the next loop, in functions that may call others.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// 2 * LANES elements as float32.
template <class T>
inline std::tuple<Vec, Vec> load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(from), Vec::loadu(from + LANES)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  }
}

// The first `count` of 2 * LANES elements as float32, and 0 in the other lanes.
template <class T>
inline std::tuple<Vec, Vec> load_pair(const T* from, int64_t count) {
  if (count >= 2 * LANES) return load_pair(from);
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(from, std::min(LANES, count)),
            count > LANES ? Vec::loadu(from + LANES, count - LANES) : Vec(0.0f)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, count));
  }
}

// Stores the first `count` of 2 * LANES elements, rounded to T.
template <class T>
inline void store_pair(const Vec& low, const Vec& high, T* to, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    low.store(to, std::min(LANES, count));
    if (count > LANES) high.store(to + LANES, count - LANES);
  } else {
    at::vec::convert_from_float<T>(low, high).store(to, count);
  }
}

// The sum over the lanes: lane i plus lane i + n / 2 of n lanes, again and again. The order of
// at::vec::vec_reduce_all depends on the compiler.
inline float sum_lanes(const Vec& lanes) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#if defined(CPU_CAPABILITY_AVX512)
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
#else
  const __m256 eight = lanes;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float sums[LANES];
  lanes.store(sums);
  for (int64_t n = LANES / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; i++) sums[i] = sums[i] + sums[i + n];
  return sums[0];
#endif
}

// 32 sums, lane by lane: element i of a row is added to lane i % 32. With vectors of any length,
// they are the same sums.
struct LogicalLanes {
  static constexpr int64_t COUNT = 32, VECTORS = COUNT / LANES;
  static_assert(COUNT % LANES == 0);

  Vec lanes[VECTORS];

  LogicalLanes() {
    UNROLL
    for (int v = 0; v < VECTORS; v++) lanes[v] = Vec(0.0f);
  }

  // A fixed tree: lane i plus lane i + 16, then plus lane i + 8, and so on.
  float total() const {
    Vec sums[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; v++) sums[v] = lanes[v];
    UNROLL
    for (int n = VECTORS / 2; n > 0; n /= 2)
      UNROLL
      for (int v = 0; v < n; v++) sums[v] = sums[v] + sums[v + n];
    return sum_lanes(sums[0]);
  }
};

// The maximum over the lanes; NaN if one is NaN.
inline float max_lanes(const Vec& lanes) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); },
                                        lanes);
}

}  // namespace gptbatch
