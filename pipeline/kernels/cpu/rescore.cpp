// Of logits that are known roughly, exactly those that can matter: gpt/screen.py says which and why.
//
//     gptbatch::rescore(logits, hidden, weight, of_rows, of_blocks, kept, slack) -> floors; changes logits
//
//     logits     (B, V)       float32: in, each nearly the row of `hidden` times the row of `weight`; out, exactly it where it may
//                             be at least the row's floor, as `linear` computes it in float32
//     hidden     (B, C)       float32
//     weight     (V, C)       float32
//     of_rows    (B, 2)       float64 and
//     of_blocks  (blocks, 2)  float64: their product bounds how far a row's logits of a block of 32 tokens are from exact
//     kept       (B,)         int64, 1 to V - 1
//     slack      (B,)         float64, at least 0
//     floors     (B,)         float64: at most the kept-th largest exact logit less the slack; NaN where too many logits would have
//                             to be computed, or one is not finite, and the row was left alone

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "epilogue.h"
#include "maxima.h"

namespace {

using namespace gptbatch;

constexpr int AT_ONCE = 8;          // sums side by side: as many as hide how long one addition takes
constexpr int64_t MOST_SHARE = 64;  // one logit in so many is computed at most: more are no quicker than all of them
constexpr double TINY = 1e-30;       // instructions for bfloat16 take products below 1.2e-38 for 0
constexpr double HUGE_ERROR = 1e28;  // below, no sum can have come near the end of float32
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

struct Errors {
  double of_hidden, of_weight;
  double bound(const double* block) const { return of_hidden * block[0] + of_weight * block[1] + TINY; }
};

// The logits of some tokens, each summed as `linear` does: over the inputs 0, 1, 2, ... by fused multiply-add.
void compute(const float* hidden, const float* weight, int64_t in, const std::vector<int64_t>& tokens, float* logits) {
  for (size_t first = 0; first < tokens.size(); first += AT_ONCE) {
    const size_t count = std::min<size_t>(AT_ONCE, tokens.size() - first);
    std::array<const float*, AT_ONCE> rows, next;  // next: of the tokens after these, asked for on the way
    float sums[AT_ONCE] = {};
    for (size_t i = 0; i < AT_ONCE; i++) {
      rows[i] = weight + tokens[first + std::min(i, count - 1)] * in;
      next[i] = weight + tokens[std::min(first + AT_ONCE + i, tokens.size() - 1)] * in;
    }
    for (int64_t begin = 0; begin < in; begin += CACHE_LINE / 4) {
      for (int i = 0; i < AT_ONCE; i++) __builtin_prefetch(next[i] + begin);
      const int64_t end = std::min<int64_t>(in, begin + CACHE_LINE / 4);
      for (int64_t k = begin; k < end; k++) {
        UNROLL
        for (int i = 0; i < AT_ONCE; i++) sums[i] = std::fma(hidden[k], rows[i][k], sums[i]);
      }
    }
    for (size_t i = 0; i < count; i++) logits[tokens[first + i]] = sums[i];
  }
}

struct Scratch {
  std::vector<float> maxima, groups;
  std::vector<int64_t> tokens;
};

double rescore_row(float* logits, int64_t vocab_size, const float* hidden, const float* weight, int64_t in, const Errors& errors,
                  const double* of_blocks, int64_t kept, double slack, Scratch& scratch) {
  auto& [maxima, groups, tokens] = scratch;
  find_maxima(logits, vocab_size, maxima);
  double largest_error = 0.0;
  for (size_t b = 0; b < maxima.size(); b++) {
    const double error = errors.bound(of_blocks + 2 * b);
    if (!std::isfinite(maxima[b]) || !(error < HUGE_ERROR)) return NOT_A_NUMBER;
    largest_error = std::max(largest_error, error);
  }
  // at least `kept` rough logits reach the first number, and so as many exact ones the second
  const double floor = find_floor(logits, vocab_size, kept, maxima, groups) - largest_error - slack;
  tokens.clear();
  for (size_t b = 0; b < maxima.size(); b++) {
    const double least = floor - errors.bound(of_blocks + 2 * b);
    if (maxima[b] < least) continue;
    const int64_t first = static_cast<int64_t>(b) * BLOCK;
    for (int64_t token = first; token < std::min(vocab_size, first + BLOCK); token++)
      if (logits[token] >= least) tokens.push_back(token);
    if (static_cast<int64_t>(tokens.size()) * MOST_SHARE > vocab_size) return NOT_A_NUMBER;
  }
  compute(hidden, weight, in, tokens, logits);
  return floor;
}

at::Tensor rescore(at::Tensor& logits, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& of_rows,
                  const at::Tensor& of_blocks, const at::Tensor& kept, const at::Tensor& slack) {
  const int64_t batch = logits.size(0), vocab_size = logits.size(1), in = hidden.size(1);
  TORCH_CHECK(logits.is_contiguous() && hidden.is_contiguous() && weight.is_contiguous() && of_rows.is_contiguous() &&
                  of_blocks.is_contiguous() && hidden.size(0) == batch && weight.size(0) == vocab_size && weight.size(1) == in &&
                  of_rows.numel() == 2 * batch && of_blocks.numel() == 2 * ((vocab_size + BLOCK - 1) / BLOCK) && kept.numel() == batch &&
                  slack.numel() == batch,
              "rescore: the shapes do not fit each other");
  at::Tensor floors = at::empty({batch}, slack.options());
  float* of_logits = logits.data_ptr<float>();
  const float *of_hidden = hidden.const_data_ptr<float>(), *of_weight = weight.const_data_ptr<float>();
  const double *rows = of_rows.const_data_ptr<double>(), *blocks = of_blocks.const_data_ptr<double>(), *slacks = slack.const_data_ptr<double>();
  const int64_t* counts = kept.const_data_ptr<int64_t>();
  double* floor = floors.data_ptr<double>();
  for_each(batch, 1, [&](int64_t i) {
    static thread_local Scratch scratch;
    floor[i] = rescore_row(of_logits + i * vocab_size, vocab_size, of_hidden + i * in, of_weight, in, {rows[2 * i], rows[2 * i + 1]}, blocks,
                          counts[i], slacks[i], scratch);
  });
  return floors;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def("rescore(Tensor(a!) logits, Tensor hidden, Tensor weight, Tensor of_rows, Tensor of_blocks, Tensor kept, Tensor slack) -> Tensor");
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) { library.impl("rescore", rescore); }
