// What the kernels share: vectors of float32, loops that are unrolled, work that is shared among the threads.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

namespace gptbatch {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr int64_t CACHE_LINE = 64;

// A vector as a type of the compiler's own, where it has one: arrays of a class do not always stay in registers.
#if defined(CPU_CAPABILITY_AVX512)
using Register = __m512;
#elif defined(CPU_CAPABILITY_AVX2)
using Register = __m256;
#else
using Register = Vec;
#endif

// a * b + c, rounded once where the CPU can.
inline Register multiply_add(Register a, Register b, Register c) {
  return at::vec::fmadd(Vec(a), Vec(b), Vec(c));
}

// Calls work(0), work(1), ... work(N - 1), written out: an array stays in registers only where no loop over it is left when the compiler
// decides. For functions that are FLAT, in which nothing is called.
template <int N, class F>
inline void unroll(const F& work) {
  [&]<int... I>(std::integer_sequence<int, I...>) { (work(std::integral_constant<int, I>()), ...); }(std::make_integer_sequence<int, N>());
}
#define FLAT __attribute__((flatten))

// 2 * LANES numbers as float32.
template <class T>
inline std::tuple<Vec, Vec> load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(from), Vec::loadu(from + LANES)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  }
}

// The same of the first `count`, and 0 for the others.
template <class T>
inline std::tuple<Vec, Vec> load_pair(const T* from, int64_t count) {
  if (count >= 2 * LANES) return load_pair(from);
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(from, std::min(LANES, count)), count > LANES ? Vec::loadu(from + LANES, count - LANES) : Vec(0.0f)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, count));
  }
}

inline float sum_of(const Vec& numbers) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, numbers);
}

// Calls work(i) for i from 0 to count - 1, on all threads, each taking the next few when it is done with its last.
template <class F>
void for_each(int64_t count, int64_t few, const F& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), (count + few - 1) / few), 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(few)) < count;)
      for (int64_t i = first; i < std::min(first + few, count); i++) work(i);
  });
}

}  // namespace gptbatch
