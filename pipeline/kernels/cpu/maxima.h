// The largest logits of a row, found without sorting it.

#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "common.h"

namespace gptbatch {

constexpr int64_t BLOCK = 32;  // tokens whose largest logit is kept

// The largest of each block; NaN where there is one.
template <class T>
void find_maxima(const T* logits, int64_t vocab_size, std::vector<float>& maxima) {
  const int64_t whole = vocab_size / BLOCK;
  maxima.resize((vocab_size + BLOCK - 1) / BLOCK);
  for (int64_t b = 0; b < whole; b++) {
    const T* from = logits + b * BLOCK;
    auto [top, other] = load_pair(from);
    for (int64_t i = 2 * LANES; i < BLOCK; i += 2 * LANES) {
      const auto [x, y] = load_pair(from + i);
      top = at::vec::maximum(top, x);
      other = at::vec::maximum(other, y);
    }
    maxima[b] = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, at::vec::maximum(top, other));
  }
  if (whole * BLOCK < vocab_size) {
    float top = static_cast<float>(logits[whole * BLOCK]);
    for (int64_t i = whole * BLOCK + 1; i < vocab_size; i++) {
      const float x = static_cast<float>(logits[i]);
      if (!(x <= top)) top = std::isnan(top) ? top : x;
    }
    maxima[whole] = top;
  }
}

// A floor, at or below the k-th largest logit and not far below: the k-th largest of the maxima of some groups of tokens.
template <class T>
float find_floor(const T* logits, int64_t vocab_size, int64_t kept, const std::vector<float>& maxima, std::vector<float>& groups) {
  if (4 * kept <= static_cast<int64_t>(maxima.size())) {
    groups = maxima;
  } else {  // these blocks are too few: tokens that are equal modulo the number of groups
    const int64_t count = (4 * kept + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    if (2 * count > vocab_size) return -std::numeric_limits<float>::infinity();
    groups.assign(count, -std::numeric_limits<float>::infinity());
    int64_t first = 0;
    for (; first + count <= vocab_size; first += count) {
      for (int64_t i = 0; i < count; i += 2 * LANES) {
        const auto [x, y] = load_pair(logits + first + i);
        at::vec::maximum(x, Vec::loadu(&groups[i])).store(&groups[i]);
        at::vec::maximum(y, Vec::loadu(&groups[i + LANES])).store(&groups[i + LANES]);
      }
    }
    for (int64_t i = 0; first + i < vocab_size; i++) groups[i] = std::max(groups[i], static_cast<float>(logits[first + i]));
  }
  std::nth_element(groups.begin(), groups.begin() + (kept - 1), groups.end(), std::greater<float>());
  return groups[kept - 1];
}

}  // namespace gptbatch
