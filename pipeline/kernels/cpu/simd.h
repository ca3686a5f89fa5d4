// Vectors of float32, loops unrolled at compile time, and work shared among the threads.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <atomic>
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

// a * b + c, rounded once where the CPU has fused multiply-add.
inline Register multiply_add(Register a, Register b, Register c) {
  return at::vec::fmadd(Vec(a), Vec(b), Vec(c));
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

inline float sum_lanes(const Vec& lanes) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, lanes);
}

// The maximum over the lanes; NaN if one is NaN.
inline float max_lanes(const Vec& lanes) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); },
                                        lanes);
}

// Calls work(i) for i in [0, count) on all threads. Each thread takes `grain` indices at a time.
template <class F>
void parallel_for_each(int64_t count, int64_t grain, const F& work) {
  std::atomic<int64_t> next{0};
  const int64_t n_grains = (count + grain - 1) / grain;
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), n_grains), 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(grain)) < count;)
      for (int64_t i = first; i < std::min(first + grain, count); i++) work(i);
  });
}

}  // namespace gptbatch
