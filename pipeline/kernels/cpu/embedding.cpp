// The sum of token and position embeddings.
//
//     x[i] = token_table[tokens[i]] + position_table[positions[i]]
//
// It is exact in every order. The kernel is here because it keeps subnormals in every thread.

#include "kernels.h"
#include "simd.h"
#include "threads.h"

namespace gptbatch {
namespace {

constexpr int64_t EMBEDDINGS_PER_GRAIN = 16;
constexpr int64_t MIN_PARALLEL_SUMS = 1 << 15;  // less work is not worth waking threads

}  // namespace

template <class T>
void embed(const int64_t* tokens, const int64_t* positions, int64_t count, int64_t width,
           const T* token_table, const T* position_table, T* x) {
  const auto work = [&](int64_t i) {
    const T* a = token_table + tokens[i] * width;
    const T* b = position_table + positions[i] * width;
    T* y = x + i * width;
    for (int64_t c = 0; c < width; c += LANES)
      store(y + c, load(a + c, width - c) + load(b + c, width - c), width - c);
  };
  if (count * width < MIN_PARALLEL_SUMS) {
    const StandardFloatMode mode;
    for (int64_t i = 0; i < count; i++) work(i);
  } else {
    parallel_for_each(count, EMBEDDINGS_PER_GRAIN, work);
  }
}

template void embed(const int64_t*, const int64_t*, int64_t, int64_t, const float*, const float*,
                    float*);
template void embed(const int64_t*, const int64_t*, int64_t, int64_t, const BFloat16*,
                    const BFloat16*, BFloat16*);

}  // namespace gptbatch
