// Samples the next token of each row by the Gumbel-max trick, with its decision margin.
//
//     score[t] = logit[t] + temperature * gumbel(seed, step, t), over the kept set
//     token    = argmax(score)
//     margin   = twice how far logits may move before another token wins
//
// pipeline/engine/sampling.py defines both, pipeline/engine/noise.py the noise. Naive code that
// computes the token:
//
//     cutoff = max(k-th largest logit, largest logit - kept_range, cutoff of top_p);
//     for (t = 0; t < V; t++)
//       if (logit[t] >= cutoff && logit[t] + temperature * gumbel(t) > best) best = ..., token = t;
//
// Nothing is sorted. One pass finds the maximum of each group of 32 tokens; later passes skip
// groups whose maximum is below the threshold. Where the kept set is the full vocabulary, random
// bits are made for all tokens, but logarithms only where the bits are large enough to change the
// result: the noise grows with n, and a score above s needs n > 2^52 exp(-exp(-(s - logit) /
// temperature)).

#include <cmath>
#include <limits>
#include <vector>

#include "nucleus.h"
#include "threads.h"
#include "vocab_maxima.h"

namespace gptbatch {
namespace {

constexpr int64_t NOISE_TOKENS = 2 * TOKENS_PER_GROUP;  // tokens whose random bits are made at once
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr double MAX_NOISE = 37.0;  // -log(-log(1 - 2^-53)) is 36.74
constexpr double TWO_52 = 4503599627370496.0;

struct SampleRow {
  uint64_t seed, step;
  double temperature;
  int64_t kept_size;
  double kept_range;
  double top_p;
  double margin_bound;
};

struct SampledToken {
  int64_t token;
  double margin;
};

struct Candidate {
  float logit;
  int64_t token;
};

// The 52 random bits n of noise version 1, for the tokens 2 i and 2 i + 1 of COUNT pairs i.
// Philox4x32-10 (Salmon et al. 2011) with counter (i, step, 0, 0) and the seed as key.
template <int64_t COUNT>
inline void random_bits(const SampleRow& row, const int64_t* pairs, uint64_t* n) {
  uint64_t c0[COUNT], c1[COUNT], c2[COUNT], c3[COUNT];
  for (int64_t i = 0; i < COUNT; i++) {
    c0[i] = static_cast<uint64_t>(pairs[i]);
    c1[i] = row.step;
    c2[i] = c3[i] = 0;
  }
  uint64_t k0 = row.seed & 0xFFFFFFFF, k1 = row.seed >> 32;
  for (int round = 0; round < 10; round++) {
    // Only the lower 32 bits of a word count; the upper ones may hold anything.
    for (int64_t i = 0; i < COUNT; i++) {
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

// g = -log(-log(u)), u = (n + 0.5) / 2^52. n and g may be the same memory.
void gumbel(const uint64_t* n, int64_t count, double* g) {
  constexpr int64_t AT_ONCE = 8;
  for (int64_t i = 0; i < count; i += AT_ONCE) {
    const int64_t valid = std::min(AT_ONCE, count - i);
    uint64_t bits[AT_ONCE] = {};
    double noise[AT_ONCE];
    std::copy_n(n + i, valid, bits);
    for (int64_t j = 0; j < AT_ONCE; j++) {
      const uint64_t two_52_plus_n = bits[j] | std::bit_cast<uint64_t>(TWO_52);
      const double whole = std::bit_cast<double>(two_52_plus_n) - TWO_52;
      noise[j] = -log_of_normal(-log_of_normal((whole + 0.5) / TWO_52));
    }
    std::copy_n(noise, valid, g + i);
  }
}

// Buffers that a thread keeps between rows.
class SampleScratch {
 public:
  std::vector<float> maxima, work;
  std::vector<Candidate> candidates;
  std::vector<uint64_t> bits;
  std::vector<double> scores;
  Nucleus nucleus;

  void score_candidates(const SampleRow& row) {
    bits.resize(candidates.size());
    scores.resize(candidates.size());
    constexpr size_t BATCH = 8;
    for (size_t begin = 0; begin < candidates.size(); begin += BATCH) {
      const size_t count = std::min(BATCH, candidates.size() - begin);
      int64_t pairs[BATCH] = {};
      uint64_t n[2 * BATCH];
      for (size_t i = 0; i < count; i++) pairs[i] = candidates[begin + i].token / 2;
      random_bits<BATCH>(row, pairs, n);
      for (size_t i = 0; i < count; i++)
        bits[begin + i] = n[2 * i + candidates[begin + i].token % 2];
    }
    gumbel(bits.data(), static_cast<int64_t>(candidates.size()), scores.data());
    for (size_t i = 0; i < candidates.size(); i++)
      scores[i] = static_cast<double>(candidates[i].logit) + row.temperature * scores[i];
  }
};

// Appends the tokens with low <= logit < high to the candidates, in ascending order.
template <class T>
void append_candidates(const T* logits, int64_t vocab_size, double low, double high,
                       SampleScratch& scratch) {
  for (size_t g = 0; g < scratch.maxima.size(); g++) {
    if (!(scratch.maxima[g] >= low)) continue;
    const int64_t first = static_cast<int64_t>(g) * TOKENS_PER_GROUP;
    Candidate found[TOKENS_PER_GROUP];
    int64_t count = 0;
    for (int64_t token = first; token < std::min(vocab_size, first + TOKENS_PER_GROUP); token++) {
      const float x = static_cast<float>(logits[token]);
      found[count] = {x, token};
      // No branch: it would be mispredicted too often.
      count += x >= low && x < high;
    }
    scratch.candidates.insert(scratch.candidates.end(), found, found + count);
  }
}

// The (k+1)-th largest logit, ties counted one by one. `scratch.work` holds the logits of the
// candidates, of which the k largest come first and the k-th is `kth`.
template <class T>
double next_largest(const T* logits, int64_t vocab_size, int64_t k, float kth,
                    const SampleScratch& scratch) {
  if (static_cast<int64_t>(scratch.work.size()) > k)
    return *std::max_element(scratch.work.begin() + k, scratch.work.end());
  double outside = -INFINITE;
  for (size_t g = 0; g < scratch.maxima.size(); g++) {
    const int64_t first = static_cast<int64_t>(g) * TOKENS_PER_GROUP;
    if (scratch.maxima[g] < kth) {
      outside = std::max<double>(outside, scratch.maxima[g]);
    } else {
      for (int64_t token = first; token < std::min(vocab_size, first + TOKENS_PER_GROUP); token++)
        if (static_cast<float>(logits[token]) < kth)
          outside = std::max<double>(outside, static_cast<float>(logits[token]));
    }
  }
  return outside;
}

// The largest logit of all tokens but one.
template <class T>
double largest_besides(const T* logits, int64_t vocab_size, int64_t token,
                       const SampleScratch& scratch) {
  double largest = -INFINITE;
  for (size_t g = 0; g < scratch.maxima.size(); g++) {
    const int64_t first = static_cast<int64_t>(g) * TOKENS_PER_GROUP;
    const int64_t end = std::min(vocab_size, first + TOKENS_PER_GROUP);
    if (token < first || token >= end) {
      largest = std::max<double>(largest, scratch.maxima[g]);
    } else {
      for (int64_t t = first; t < end; t++)
        if (t != token) largest = std::max<double>(largest, static_cast<float>(logits[t]));
    }
  }
  return largest;
}

// Samples from the tokens whose logit reaches the cutoff. `max` is the largest logit.
template <class T>
SampledToken sample_kept_set(const T* logits, int64_t vocab_size, float max, const SampleRow& row,
                             SampleScratch& scratch) {
  auto& [maxima, work, candidates, bits, scores, nucleus] = scratch;
  candidates.clear();
  const bool has_top_p = row.top_p < 1.0;
  if (has_top_p)
    nucleus.begin(max, row.temperature, row.top_p, mass_bits(vocab_size));
  double cutoff = static_cast<double>(max) - row.kept_range;
  // A kept token whose logit falls to this would not be kept.
  double exit = -INFINITE;
  if (row.kept_size < vocab_size) {
    const float threshold = find_threshold(logits, vocab_size, row.kept_size, maxima, work);
    append_candidates(logits, vocab_size, threshold, INFINITE, scratch);
    work.clear();
    for (const Candidate& candidate : candidates) work.push_back(candidate.logit);
    std::nth_element(work.begin(), work.begin() + (row.kept_size - 1), work.end(),
                     std::greater<float>());
    const float kth = work[row.kept_size - 1];
    exit = next_largest(logits, vocab_size, row.kept_size, kth, scratch);
    cutoff = std::max(cutoff, static_cast<double>(kth));
    if (has_top_p)
      for (const Candidate& candidate : candidates)
        if (candidate.logit >= kth) nucleus.add(candidate.logit);
  } else if (has_top_p) {
    nucleus.add(logits, vocab_size);
  }
  const double base_cutoff = cutoff;
  double cutoff_p = -INFINITE;
  if (has_top_p) {
    nucleus.compute_masses();
    cutoff_p = nucleus.cutoff();
    cutoff = std::max(cutoff, cutoff_p);
  }
  const auto append = [&](double low, double high) {
    if (has_top_p && row.kept_size == vocab_size)
      // Clang 14 captures no structured bindings.
      scratch.nucleus.for_each(low, high, [&scratch](float logit, int64_t token) {
        scratch.candidates.push_back({logit, token});
      });
    else
      append_candidates(logits, vocab_size, low, high, scratch);
  };
  if (row.kept_size == vocab_size) append(cutoff, INFINITE);
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(),
                                  [&](const Candidate& c) { return c.logit < cutoff; }),
                   candidates.end());
  scratch.score_candidates(row);
  // Candidates are in token order: of equal scores the smallest token wins.
  size_t best = 0;
  for (size_t i = 1; i < candidates.size(); i++)
    if (scores[i] > scores[best]) best = i;
  double second = -INFINITE;
  for (size_t i = 0; i < candidates.size(); i++)
    if (i != best) second = std::max(second, scores[i]);
  const Candidate winner = candidates[best];
  const double best_score = scores[best];
  if (std::isfinite(row.kept_range)) {
    const double other = winner.logit == max
                             ? largest_besides(logits, vocab_size, winner.token, scratch)
                             : static_cast<double>(max);
    exit = std::max(exit, other - row.kept_range);
  }
  double margin = std::min(
      std::min(best_score - second, static_cast<double>(winner.logit) - exit), row.margin_bound);

  if (has_top_p) margin = std::min(margin, nucleus.reach_of_kept(winner.logit, margin));

  // A token outside the kept set lowers the margin only if its logit is near the cutoff.
  candidates.clear();
  const double lowest =
      has_top_p ? std::min(cutoff - margin, nucleus.lowest(margin)) : cutoff - margin;
  append(lowest, cutoff);
  scratch.score_candidates(row);
  for (size_t i = 0; i < candidates.size(); i++) {
    const float logit = candidates[i].logit;
    double distance =
        std::max(base_cutoff - static_cast<double>(logit), best_score - scores[i]);
    if (logit < cutoff_p && distance < margin)
      distance = std::max(distance, nucleus.reach_of_outside(logit, margin));
    margin = std::min(margin, distance);
  }
  return {winner.token, margin};
}

// Samples from the full vocabulary.
template <class T>
SampledToken sample_full_vocab(const T* logits, int64_t vocab_size, const SampleRow& row,
                               SampleScratch& scratch) {
  const std::vector<float>& maxima = scratch.maxima;
  int64_t token = -1;
  double best = -INFINITE, second = -INFINITE;
  uint64_t n[NOISE_TOKENS], large[NOISE_TOKENS];
  double noise[NOISE_TOKENS];
  int64_t tokens[NOISE_TOKENS];
  for (size_t g = 0; g < maxima.size(); g += 2) {
    // Bits below min_bits give a score below the second best.
    uint64_t min_bits = 0;
    if (second > -INFINITE) {
      const double max = std::max(maxima[g], g + 1 < maxima.size() ? maxima[g + 1] : maxima[g]);
      // 1e-6 and 4 exceed all rounding errors.
      const double needed = (second - max) / row.temperature - 1e-6;
      if (needed > MAX_NOISE) continue;
      const double bits = std::exp(-std::exp(-needed)) * TWO_52 - 4.0;
      min_bits = static_cast<uint64_t>(std::max(0.0, bits));
    }
    const int64_t first = static_cast<int64_t>(g) * TOKENS_PER_GROUP;
    const int64_t size = std::min(NOISE_TOKENS, vocab_size - first);
    int64_t pairs[NOISE_TOKENS / 2];
    for (int64_t i = 0; i < NOISE_TOKENS / 2; i++) pairs[i] = first / 2 + i;
    random_bits<NOISE_TOKENS / 2>(row, pairs, n);
    int64_t count = 0;
    for (int64_t i = 0; i < size; i++) {
      tokens[count] = first + i;
      large[count] = n[i];
      count += n[i] >= min_bits;
    }
    gumbel(large, count, noise);
    for (int64_t i = 0; i < count; i++) {
      const double logit = static_cast<double>(static_cast<float>(logits[tokens[i]]));
      const double score = logit + row.temperature * noise[i];
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
SampledToken sample_row(const T* logits, int64_t vocab_size, const SampleRow& row,
                        SampleScratch& scratch) {
  find_maxima(logits, vocab_size, scratch.maxima);
  float max = scratch.maxima[0];
  for (const float x : scratch.maxima) {
    if (std::isnan(x)) return {-1, 0.0};
    max = std::max(max, x);
  }
  if (std::isinf(max)) return {-1, 0.0};
  return row.kept_size < vocab_size || std::isfinite(row.kept_range) || row.top_p < 1.0
             ? sample_kept_set(logits, vocab_size, max, row, scratch)
             : sample_full_vocab(logits, vocab_size, row, scratch);
}

}  // namespace

template <class T>
void sample(const T* logits, int64_t n_rows, int64_t vocab_size, const SampleRows& rows,
            int64_t* tokens, double* margins) {
  parallel_for_each(n_rows, 1, [&](int64_t i) {
    static thread_local SampleScratch scratch;
    const SampleRow row{static_cast<uint64_t>(rows.seeds[i]), static_cast<uint64_t>(rows.steps[i]),
                        rows.temperatures[i], rows.kept_sizes[i], rows.kept_ranges[i],
                        rows.top_ps[i], rows.margin_bounds[i]};
    const SampledToken sampled = sample_row(logits + i * vocab_size, vocab_size, row, scratch);
    tokens[i] = sampled.token;
    margins[i] = sampled.margin;
  });
}

template void sample(const float*, int64_t, int64_t, const SampleRows&, int64_t*, double*);
template void sample(const BFloat16*, int64_t, int64_t, const SampleRows&, int64_t*, double*);

}  // namespace gptbatch
