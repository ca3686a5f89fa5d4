// Work shared among the threads of torch: at::parallel_for.

#include "threads.h"

#include <ATen/Parallel.h>

namespace gptbatch {

int64_t max_threads() { return at::get_num_threads(); }

void call_on_threads(int64_t count, void (*body)(const void* context), const void* context) {
  at::parallel_for(0, count, 1, [&](int64_t, int64_t) { body(context); });
}

}  // namespace gptbatch
