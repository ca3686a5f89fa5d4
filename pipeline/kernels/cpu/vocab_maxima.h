// Group maxima of the logits of a row, and a threshold for its k largest, without a sort.

#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "simd.h"

namespace gptbatch {

// The largest logit of each group of consecutive tokens; NaN if one is NaN.
template <class T>
void find_maxima(const T* logits, int64_t vocab_size, std::vector<float>& maxima) {
  const int64_t full = vocab_size / TOKENS_PER_GROUP;
  maxima.resize((vocab_size + TOKENS_PER_GROUP - 1) / TOKENS_PER_GROUP);
  for (int64_t g = 0; g < full; g++) {
    const T* from = logits + g * TOKENS_PER_GROUP;
    Vec max = load(from);
    UNROLL
    for (int64_t i = LANES; i < TOKENS_PER_GROUP; i += LANES) max = maximum(max, load(from + i));
    maxima[g] = max_lanes(max);
  }
  if (full * TOKENS_PER_GROUP < vocab_size) {
    float max = static_cast<float>(logits[full * TOKENS_PER_GROUP]);
    for (int64_t i = full * TOKENS_PER_GROUP + 1; i < vocab_size; i++) {
      const float x = static_cast<float>(logits[i]);
      if (!(x <= max)) max = std::isnan(max) ? max : x;
    }
    maxima[full] = max;
  }
}

// A threshold at or below the k-th largest logit: the k-th largest maximum of disjoint sets of
// tokens, since k sets have a logit that reaches it. `work` is a buffer.
template <class T>
float find_threshold(const T* logits, int64_t vocab_size, int64_t k,
                     const std::vector<float>& maxima, std::vector<float>& work) {
  constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
  if (4 * k <= static_cast<int64_t>(maxima.size())) {
    work = maxima;
  } else {
    // Too few groups for a tight threshold: a set is the tokens that are equal modulo n_sets.
    const int64_t n_sets = (4 * k + LANES - 1) / LANES * LANES;
    if (2 * n_sets > vocab_size) return MINUS_INFINITY;
    work.assign(n_sets, MINUS_INFINITY);
    int64_t first = 0;
    for (; first + n_sets <= vocab_size; first += n_sets) {
      for (int64_t i = 0; i < n_sets; i += LANES)
        store(&work[i], maximum(load(logits + first + i), load(&work[i])));
    }
    for (int64_t i = 0; first + i < vocab_size; i++)
      work[i] = std::max(work[i], static_cast<float>(logits[first + i]));
  }
  std::nth_element(work.begin(), work.begin() + (k - 1), work.end(), std::greater<float>());
  return work[k - 1];
}

}  // namespace gptbatch
