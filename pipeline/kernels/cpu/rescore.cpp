// Second pass of the two-pass LM head: recomputes in float32 the logits that can matter.
//
// The first pass gives approximate logits and, per row and group of 32 tokens, a bound of their
// error. pipeline/model/lm_head.py derives the bound. For each row:
//
//     threshold = (at most) k-th largest approximate logit - largest error - exact_range
//     for (t = 0; t < V; t++)
//       if (logit[t] >= threshold - error[group of t]) logit[t] = dot(hidden, weight[t]);
//
// At least k exact logits reach (threshold + exact_range), so every exact logit within exact_range
// of the k-th largest is recomputed. Fallback: the row is left unchanged and its threshold is NaN
// if more than 1 in 64 logits are candidates, or if a logit is not finite. The caller then computes
// the row with the exact head.

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "threads.h"
#include "vocab_maxima.h"

namespace gptbatch {
namespace {

constexpr int DOTS_AT_ONCE = 8;  // independent sums that hide the latency of fused multiply-add
constexpr int64_t LOGITS_PER_CANDIDATE = 64;  // with more candidates, the exact head is faster
constexpr double MIN_ERROR = 1e-30;  // bfloat16 instructions flush products below 1.2e-38 to 0
constexpr double MAX_ERROR = 1e28;   // below it, no sum came near the largest float32
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

// Factors of a row for the two norms of a group. Their sum of products bounds the errors of the
// group's logits.
struct RowFactors {
  double times_weight, times_rounding;
  double error_bound(const double* group_norms) const {
    return times_weight * group_norms[0] + times_rounding * group_norms[1] + MIN_ERROR;
  }
};

struct RescoreScratch {
  std::vector<float> maxima, work;
  std::vector<int64_t> candidates;
};

// Exact logits of the candidates, in the reduction order of `linear` in float32: k = 0, 1, 2, ...
// by fused multiply-add. sums[0] to sums[7] are of eight candidates. Prefetches the weights of the
// next eight.
void compute_logits(const float* hidden, const float* weight, int64_t width,
                    const std::vector<int64_t>& candidates, float* logits) {
  constexpr int64_t LINE = CACHE_LINE_BYTES / static_cast<int64_t>(sizeof(float));
  for (size_t first = 0; first < candidates.size(); first += DOTS_AT_ONCE) {
    const size_t count = std::min<size_t>(DOTS_AT_ONCE, candidates.size() - first);
    std::array<const float*, DOTS_AT_ONCE> rows, next;
    float sums[DOTS_AT_ONCE] = {};
    for (size_t i = 0; i < DOTS_AT_ONCE; i++) {
      rows[i] = weight + candidates[first + std::min(i, count - 1)] * width;
      next[i] = weight +
                candidates[std::min(first + DOTS_AT_ONCE + i, candidates.size() - 1)] * width;
    }
    for (int64_t begin = 0; begin < width; begin += LINE) {
      for (int i = 0; i < DOTS_AT_ONCE; i++) __builtin_prefetch(next[i] + begin);
      const int64_t end = std::min<int64_t>(width, begin + LINE);
      for (int64_t k = begin; k < end; k++) {
        UNROLL
        for (int i = 0; i < DOTS_AT_ONCE; i++)
          sums[i] = multiply_add(hidden[k], rows[i][k], sums[i]);
      }
    }
    for (size_t i = 0; i < count; i++) logits[candidates[first + i]] = sums[i];
  }
}

// Returns the threshold of row i.
double rescore_row(float* logits, const RescoreInputs& inputs, int64_t i,
                   RescoreScratch& scratch) {
  auto& [maxima, work, candidates] = scratch;
  const int64_t vocab_size = inputs.vocab_size;
  const RowFactors factors{inputs.row_factors[2 * i], inputs.row_factors[2 * i + 1]};
  find_maxima(logits, vocab_size, maxima);
  double largest_error = 0.0;
  for (size_t g = 0; g < maxima.size(); g++) {
    const double error = factors.error_bound(inputs.group_norms + 2 * g);
    if (!std::isfinite(maxima[g]) || !(error < MAX_ERROR)) return NOT_A_NUMBER;
    largest_error = std::max(largest_error, error);
  }
  const double threshold = find_threshold(logits, vocab_size, inputs.kept_sizes[i], maxima, work) -
                           largest_error - inputs.exact_ranges[i];
  candidates.clear();
  for (size_t g = 0; g < maxima.size(); g++) {
    const double min_logit = threshold - factors.error_bound(inputs.group_norms + 2 * g);
    if (maxima[g] < min_logit) continue;
    const int64_t first = static_cast<int64_t>(g) * TOKENS_PER_GROUP;
    for (int64_t token = first; token < std::min(vocab_size, first + TOKENS_PER_GROUP); token++)
      if (logits[token] >= min_logit) candidates.push_back(token);
    if (static_cast<int64_t>(candidates.size()) * LOGITS_PER_CANDIDATE > vocab_size)
      return NOT_A_NUMBER;
  }
  compute_logits(inputs.hidden + i * inputs.width, inputs.weight, inputs.width, candidates, logits);
  return threshold;
}

}  // namespace

void rescore(float* logits, const RescoreInputs& inputs, double* thresholds) {
  parallel_for_each(inputs.n_rows, 1, [&](int64_t i) {
    static thread_local RescoreScratch scratch;
    thresholds[i] = rescore_row(logits + i * inputs.vocab_size, inputs, i, scratch);
  });
}

}  // namespace gptbatch
