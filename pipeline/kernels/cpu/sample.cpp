// The next token of each row, and by how far: generation/sampling.py says what is computed, generation/noise.py how noise is drawn.
//
//     gptbatch::sample(logits, seeds, steps, temperatures, kept, bounds) -> (tokens, margins)
//
//     logits        (B, V)  float32 or bfloat16
//     seeds, steps  (B,)    int64
//     temperatures  (B,)    float64
//     kept          (B,)    int64, 1 to V: tokens that top-k keeps, besides ties
//     bounds        (B,)    float64: a margin above may come out as the bound, save where all tokens are kept
//     tokens        (B,)    int64, -1 where the logits hold NaN or +inf, or nothing but -inf
//     margins       (B,)    float64
//
// Nothing is sorted. The largest logit of each block of 32 tokens is found in one pass; blocks that cannot matter are not looked at
// again, unless there are so few that a second pass finds a better floor. Where all tokens are kept, noise is drawn for all, but its
// logarithms only where the random bits are large enough to change the result: g grows with n, so that a score above s needs n above
// 2^52 exp(-exp(-(s - logit) / temperature)).

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "maxima.h"

namespace {

using namespace gptbatch;

constexpr int64_t GROUP = 2 * BLOCK;  // for which noise is drawn at once
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr double MOST_NOISE = 37.0;  // -log(-log(1 - 2^-53)) is 36.74
constexpr double TWO_52 = 4503599627370496.0;

struct Row {
  uint64_t seed, step;
  double temperature;
  int64_t kept;
  double bound;
};

struct Choice {
  int64_t token;
  double margin;
};

struct Entry {
  float logit;
  int64_t token;
};

// n of noise version 1 for COUNT pairs of tokens, 2 i and 2 i + 1 of each pair i.
template <int64_t COUNT>
inline void random_bits(const Row& row, const int64_t* pairs, uint64_t* n) {
  uint64_t c0[COUNT], c1[COUNT], c2[COUNT], c3[COUNT];
  for (int64_t i = 0; i < COUNT; i++) {
    c0[i] = static_cast<uint64_t>(pairs[i]);
    c1[i] = row.step;
    c2[i] = c3[i] = 0;
  }
  uint64_t k0 = row.seed & 0xFFFFFFFF, k1 = row.seed >> 32;
  for (int round = 0; round < 10; round++) {
    for (int64_t i = 0; i < COUNT; i++) {  // the upper halves may hold anything: products take the lower ones
      const uint64_t a = (c0[i] & 0xFFFFFFFF) * 0xD2511F53, b = (c2[i] & 0xFFFFFFFF) * 0xCD9E8D57;
      c0[i] = (b >> 32) ^ c1[i] ^ k0;
      c1[i] = b;
      c2[i] = (a >> 32) ^ c3[i] ^ k1;
      c3[i] = a;
    }
    k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF;
    k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF;
  }
  for (int64_t i = 0; i < COUNT; i++) {
    n[2 * i] = (c0[i] & 0xFFFFFFFF) << 20 | (c1[i] & 0xFFFFFFFF) >> 12;
    n[2 * i + 1] = (c2[i] & 0xFFFFFFFF) << 20 | (c3[i] & 0xFFFFFFFF) >> 12;
  }
}

// g = -log(-log(u)) of every n; both may be the same memory.
void gumbel(const uint64_t* n, int64_t count, double* g) {
  using Doubles = at::vec::Vectorized<double>;
  const Doubles minus(-1.0);
  for (int64_t i = 0; i < count; i += Doubles::size()) {
    double u[Doubles::size()];
    const int64_t some = std::min<int64_t>(Doubles::size(), count - i);
    for (int64_t j = 0; j < Doubles::size(); j++) u[j] = j < some ? (static_cast<double>(n[i + j]) + 0.5) / TWO_52 : 0.5;
    ((Doubles::loadu(u).log() * minus).log() * minus).store(g + i, some);
  }
}

class Scratch {
 public:
  std::vector<float> maxima, work;
  std::vector<Entry> listed;
  std::vector<uint64_t> bits;
  std::vector<double> noise;

  // scores of the listed tokens from `first` on, into `noise`
  void score(const Row& row, size_t first = 0) {
    bits.resize(listed.size());
    noise.resize(listed.size());
    constexpr size_t SOME = 8;
    for (size_t begin = first; begin < listed.size(); begin += SOME) {
      const size_t count = std::min(SOME, listed.size() - begin);
      int64_t pairs[SOME] = {};
      uint64_t n[2 * SOME];
      for (size_t i = 0; i < count; i++) pairs[i] = listed[begin + i].token / 2;
      random_bits<SOME>(row, pairs, n);
      for (size_t i = 0; i < count; i++) bits[begin + i] = n[2 * i + listed[begin + i].token % 2];
    }
    gumbel(bits.data() + first, static_cast<int64_t>(listed.size() - first), noise.data() + first);
    for (size_t i = first; i < listed.size(); i++) noise[i] = static_cast<double>(listed[i].logit) + row.temperature * noise[i];
  }
};

// Appends the tokens of logit from `floor` to below `ceiling`.
template <class T>
void list(const T* logits, int64_t vocab_size, double floor, double ceiling, Scratch& scratch) {
  for (size_t b = 0; b < scratch.maxima.size(); b++) {
    if (!(scratch.maxima[b] >= floor)) continue;
    const int64_t first = static_cast<int64_t>(b) * BLOCK;
    Entry found[BLOCK];
    int64_t count = 0;
    for (int64_t token = first; token < std::min(vocab_size, first + BLOCK); token++) {
      const float x = static_cast<float>(logits[token]);
      found[count] = {x, token};
      count += x >= floor && x < ceiling;  // a branch would be guessed wrong too often
    }
    scratch.listed.insert(scratch.listed.end(), found, found + count);
  }
}

template <class T>
Choice choose_among_few(const T* logits, int64_t vocab_size, const Row& row, Scratch& scratch) {
  auto& [maxima, work, listed, bits, scores] = scratch;
  listed.clear();
  list(logits, vocab_size, find_floor(logits, vocab_size, row.kept, maxima, work), INFINITE, scratch);
  work.clear();
  for (const Entry& entry : listed) work.push_back(entry.logit);
  std::nth_element(work.begin(), work.begin() + (row.kept - 1), work.end(), std::greater<float>());
  const float kth = work[row.kept - 1];

  double outside = -INFINITE;  // the largest logit that is not kept
  for (const Entry& entry : listed)
    if (entry.logit < kth) outside = std::max<double>(outside, entry.logit);
  if (outside == -INFINITE) {
    for (size_t b = 0; b < maxima.size(); b++) {
      const int64_t first = static_cast<int64_t>(b) * BLOCK;
      if (maxima[b] < kth) {
        outside = std::max<double>(outside, maxima[b]);
      } else {
        for (int64_t token = first; token < std::min(vocab_size, first + BLOCK); token++)
          if (static_cast<float>(logits[token]) < kth) outside = std::max<double>(outside, static_cast<float>(logits[token]));
      }
    }
  }

  listed.erase(std::remove_if(listed.begin(), listed.end(), [&](const Entry& entry) { return entry.logit < kth; }), listed.end());
  scratch.score(row);
  size_t best = 0;  // tokens stand in order: the first of equals is the smallest
  for (size_t i = 1; i < listed.size(); i++)
    if (scores[i] > scores[best]) best = i;
  double second = -INFINITE;
  for (size_t i = 0; i < listed.size(); i++)
    if (i != best) second = std::max(second, scores[i]);
  const Entry winner = listed[best];
  const double best_score = scores[best];
  double margin = std::min(std::min(best_score - second, static_cast<double>(winner.logit) - outside), row.bound);

  // a token that was not kept can lower the margin only from nearer the k-th than that
  listed.clear();
  if (outside > -INFINITE) list(logits, vocab_size, kth - margin, kth, scratch);
  scratch.score(row);
  for (size_t i = 0; i < listed.size(); i++)
    if (scores[i] > best_score) margin = std::min(margin, static_cast<double>(kth) - static_cast<double>(listed[i].logit));
  return {winner.token, margin};
}

template <class T>
Choice choose_among_all(const T* logits, int64_t vocab_size, const Row& row, Scratch& scratch) {
  int64_t token = -1;
  double best = -INFINITE, second = -INFINITE;
  uint64_t n[GROUP], some[GROUP];
  double noise[GROUP];
  int64_t tokens[GROUP];
  for (size_t b = 0; b < scratch.maxima.size(); b += 2) {
    uint64_t least = 0;  // n below it gives a score below the second best
    if (second > -INFINITE) {
      const double top = std::max(scratch.maxima[b], b + 1 < scratch.maxima.size() ? scratch.maxima[b + 1] : scratch.maxima[b]);
      const double needed = (second - top) / row.temperature - 1e-6;  // what rounding may do, and more
      if (needed > MOST_NOISE) continue;
      least = static_cast<uint64_t>(std::max(0.0, std::exp(-std::exp(-needed)) * TWO_52 - 4.0));
    }
    const int64_t first = static_cast<int64_t>(b) * BLOCK, size = std::min(GROUP, vocab_size - first);
    int64_t pairs[GROUP / 2];
    for (int64_t i = 0; i < GROUP / 2; i++) pairs[i] = first / 2 + i;
    random_bits<GROUP / 2>(row, pairs, n);
    int64_t count = 0;
    for (int64_t i = 0; i < size; i++) {
      tokens[count] = first + i;
      some[count] = n[i];
      count += n[i] >= least;
    }
    gumbel(some, count, noise);
    for (int64_t i = 0; i < count; i++) {
      const double score = static_cast<double>(static_cast<float>(logits[tokens[i]])) + row.temperature * noise[i];
      if (score > best) {
        second = best;
        best = score;
        token = tokens[i];
      } else if (score > second) {
        second = score;
      }
    }
  }
  return {token, best - second};
}

template <class T>
Choice sample_row(const T* logits, int64_t vocab_size, const Row& row, Scratch& scratch) {
  find_maxima(logits, vocab_size, scratch.maxima);
  float top = scratch.maxima[0];
  for (const float x : scratch.maxima) {
    if (std::isnan(x)) return {-1, 0.0};
    top = std::max(top, x);
  }
  if (std::isinf(top)) return {-1, 0.0};
  return row.kept < vocab_size ? choose_among_few(logits, vocab_size, row, scratch) : choose_among_all(logits, vocab_size, row, scratch);
}

std::tuple<at::Tensor, at::Tensor> sample(const at::Tensor& logits, const at::Tensor& seeds, const at::Tensor& steps,
                                          const at::Tensor& temperatures, const at::Tensor& kept, const at::Tensor& bounds) {
  const int64_t batch = logits.size(0), vocab_size = logits.size(1);
  TORCH_CHECK(logits.is_contiguous() && seeds.numel() == batch && steps.numel() == batch && temperatures.numel() == batch &&
                  kept.numel() == batch && bounds.numel() == batch,
              "sample: the shapes do not fit each other");
  at::Tensor tokens = at::empty({batch}, seeds.options()), margins = at::empty({batch}, temperatures.options());
  const int64_t *seed = seeds.const_data_ptr<int64_t>(), *step = steps.const_data_ptr<int64_t>(), *k = kept.const_data_ptr<int64_t>();
  const double *temperature = temperatures.const_data_ptr<double>(), *bound = bounds.const_data_ptr<double>();
  int64_t* token = tokens.data_ptr<int64_t>();
  double* margin = margins.data_ptr<double>();
  const auto all = [&](const auto* from) {
    for_each(batch, 1, [&](int64_t i) {
      static thread_local Scratch scratch;
      const Row row{static_cast<uint64_t>(seed[i]), static_cast<uint64_t>(step[i]), temperature[i], k[i], bound[i]};
      const Choice choice = sample_row(from + i * vocab_size, vocab_size, row, scratch);
      token[i] = choice.token;
      margin[i] = choice.margin;
    });
  };
  if (logits.scalar_type() == at::kFloat) {
    all(logits.const_data_ptr<float>());
  } else {
    all(logits.const_data_ptr<at::BFloat16>());
  }
  return {tokens, margins};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def("sample(Tensor logits, Tensor seeds, Tensor steps, Tensor temperatures, Tensor kept, Tensor bounds) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) { library.impl("sample", sample); }
