// Work shared among the threads of torch.
//
// threads.cpp is the only file of the kernels that includes its headers: they take seconds to
// compile.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "float_mode.h"

namespace gptbatch {

// The number of threads that an op may use.
int64_t max_threads();

// Calls body(context) on up to `count` threads at once, the caller's among them, and waits for all.
// In a thread of another such call, and with one thread, it is called once.
void call_on_threads(int64_t count, void (*body)(const void* context), const void* context);

// Calls body() likewise, in the standard floating-point mode.
template <class F>
void on_threads(int64_t count, const F& body) {
  const auto call = [](const void* context) {
    const StandardFloatMode mode;
    (*static_cast<const F*>(context))();
  };
  call_on_threads(count, call, &body);
}

// Calls work(i) for i in [0, count) on all threads. Each thread takes `grain` indices at a time.
template <class F>
void parallel_for_each(int64_t count, int64_t grain, const F& work) {
  std::atomic<int64_t> next{0};
  on_threads(std::min(max_threads(), (count + grain - 1) / grain), [&] {
    for (int64_t first; (first = next.fetch_add(grain)) < count;)
      for (int64_t i = first; i < std::min(first + grain, count); i++) work(i);
  });
}

}  // namespace gptbatch
