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

// Sums stay in registers only where the compiler unrolls the short loops around them, which it does not do by itself.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace gptbatch {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();

// 2 * LANES numbers as float32.
template <class T>
inline std::tuple<Vec, Vec> load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(from), Vec::loadu(from + LANES)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  }
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
