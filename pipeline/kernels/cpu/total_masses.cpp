// The mass of all tokens of each row at temperature 1, and its largest logit: log probabilities.
//
//     max   = largest logit
//     total = sum of rint(exp(logit - max) * 2^bits)
//
// pipeline/engine/logprobs.py uses both. The sum of whole numbers does not depend on an order.

#include <cmath>
#include <limits>
#include <vector>

#include "masses.h"
#include "threads.h"
#include "vocab_maxima.h"

namespace gptbatch {
namespace {

template <class T>
int64_t total_mass(const T* logits, int64_t vocab_size, float max) {
  const int bits = mass_bits(vocab_size);
  const double largest = max;
  int64_t total = 0;
  for (int64_t first = 0; first < vocab_size; first += MASS_CHUNK) {
    const int64_t size = std::min<int64_t>(MASS_CHUNK, vocab_size - first);
    double x[MASS_CHUNK];
    int64_t masses[MASS_CHUNK];
    if (size == MASS_CHUNK) {
      for (int64_t i = 0; i < MASS_CHUNK; i++)
        x[i] = static_cast<double>(static_cast<float>(logits[first + i])) - largest;
    } else {
      for (int64_t i = 0; i < MASS_CHUNK; i++)
        x[i] = i < size ? static_cast<double>(static_cast<float>(logits[first + i])) - largest
                        : MIN_MASS_EXPONENT;
    }
    masses_of(x, bits, masses);
    for (int64_t i = 0; i < MASS_CHUNK; i++) total += masses[i];
  }
  return total;
}

}  // namespace

template <class T>
void total_masses(const T* logits, int64_t n_rows, int64_t vocab_size, int64_t* totals,
                  float* max_logits) {
  parallel_for_each(n_rows, 1, [&](int64_t row) {
    static thread_local std::vector<float> maxima;
    const T* from = logits + row * vocab_size;
    find_maxima(from, vocab_size, maxima);
    float max = maxima[0];
    for (const float x : maxima)
      if (!(x <= max)) max = std::isnan(max) ? max : x;
    max_logits[row] = max;
    totals[row] = std::isfinite(max) ? total_mass(from, vocab_size, max) : 0;
  });
}

template void total_masses(const float*, int64_t, int64_t, int64_t*, float*);
template void total_masses(const BFloat16*, int64_t, int64_t, int64_t*, float*);

}  // namespace gptbatch
