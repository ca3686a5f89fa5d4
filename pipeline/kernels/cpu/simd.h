// Vectors of float32, and loops unrolled at compile time.
//
// The vectors are those of the compiler (the vector extensions of GCC and Clang). simd_avx512.h,
// simd_avx2.h and simd_generic.h add the operations that these extensions lack.
//
// No sum may depend on the number of lanes of a vector: LogicalLanes sums in 32 lanes on every CPU.
// docs/arithmetic.md lists the order of every sum.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace gptbatch {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

// + - * / & | << >> and comparisons work lane by lane, and unsigned integers wrap around. A scalar
// operand counts for all lanes. `mask ? a : b` selects per lane.
typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Uint32Vec __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef int32_t Int32Vec __attribute__((vector_size(LANES * sizeof(int32_t))));

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

}  // namespace gptbatch

// They define, each for its instruction set:
//
//     multiply_add(a, b, c)    a * b + c, rounded once
//     round_to_integer(x)      to nearest, half to even
//     sum_lanes(x)             a fixed tree: lane i plus lane i + n / 2 of n lanes, again and again
//     max_lanes(x)             the maximum over the lanes; NaN if one is NaN
//     widen(from)              LANES numbers of 16 bits, as integers of 32 bits
//     multiply_add_pairs(a, b) a.low * b.low + a.high * b.high of the signed 16-bit halves of each
//                              lane; those of a are 0 to 255
#include "simd_avx2.h"
#include "simd_avx512.h"
#include "simd_generic.h"

namespace gptbatch {

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

// x in all lanes. (-0 - 0 is -0.)
inline Vec broadcast(float x) { return x - Vec{}; }

inline Uint32Vec to_bits(Vec x) { return std::bit_cast<Uint32Vec>(x); }
inline Vec from_bits(Uint32Vec bits) { return std::bit_cast<Vec>(bits); }

inline Vec absolute(Vec x) { return from_bits(to_bits(x) & 0x7FFFFFFF); }

// The larger number per lane; NaN if one is NaN.
inline Vec maximum(Vec a, Vec b) {
  const Vec larger = a > b ? a : b;
  return a != a ? a : larger;
}

// x, but at least `min` or at most `max`, which are numbers. NaN stays.
inline Vec clamp_min(Vec x, float min) { return broadcast(min) > x ? broadcast(min) : x; }
inline Vec clamp_max(Vec x, float max) { return broadcast(max) < x ? broadcast(max) : x; }

inline Vec int32_to_float(Uint32Vec integers) {
  return __builtin_convertvector(std::bit_cast<Int32Vec>(integers), Vec);
}

// x in the first `count` lanes, and `other` in the others.
inline Vec first_lanes(Vec x, int64_t count, float other = 0.0f) {
  Int32Vec lane{};
  for (int32_t i = 0; i < LANES; i++) lane[i] = i;
  return lane < static_cast<int32_t>(std::min(count, LANES)) ? x : broadcast(other);
}

// Loads LANES elements, and converts them to float32.
inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline Vec load(const BFloat16* from) { return from_bits(widen(&from->bits) << 16); }

// Stores LANES elements, rounded to nearest even. In bfloat16, NaN becomes 0xFFFF.
inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof(x)); }
inline void store(BFloat16* to, Vec x) {
  typedef uint16_t Uint16Vec __attribute__((vector_size(LANES * sizeof(uint16_t))));
  const Uint32Vec bits = to_bits(x), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const Uint32Vec upper = x == x ? rounded : Uint32Vec{} + 0xFFFF;
  const Uint16Vec narrow = __builtin_convertvector(upper, Uint16Vec);
  std::memcpy(to, &narrow, sizeof(narrow));
}

// The same for 0 to LANES - 1 elements. The other lanes become 0. noinline: it is rare, and code
// around it stays short.
template <class T>
__attribute__((noinline)) Vec load_part(const T* from, int64_t count) {
  T padded[LANES] = {};
  std::copy_n(from, count, padded);
  return load(padded);
}
template <class T>
__attribute__((noinline)) void store_part(T* to, Vec x, int64_t count) {
  T all[LANES];
  store(all, x);
  std::copy_n(all, count, to);
}

// The same for the first `count` elements, at most LANES.
template <class T>
inline Vec load(const T* from, int64_t count) {
  return count >= LANES ? load(from) : load_part(from, count);
}
template <class T>
inline void store(T* to, Vec x, int64_t count) {
  count >= LANES ? store(to, x) : store_part(to, x, count);
}

// 32 sums, lane by lane: element i of a row is added to lane i % 32. With vectors of any length,
// they are the same sums.
struct LogicalLanes {
  static constexpr int64_t COUNT = 32, VECTORS = COUNT / LANES;
  static_assert(COUNT % LANES == 0);

  Vec lanes[VECTORS] = {};

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

}  // namespace gptbatch
