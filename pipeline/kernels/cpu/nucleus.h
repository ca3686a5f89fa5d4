// Top-p sampling: the cutoff on logits, and its part of the decision margin.
//
// pipeline/engine/nucleus.py defines masses, cutoff and reach. Naive code for the cutoff:
//
//     sort tokens by logit, largest first; above = 0;
//     for (token of the order)
//       if (above of the larger logits < top_p * total) cutoff = logit;
//
// Masses are computed and added for all tokens. Only tokens near the largest logit are listed, in
// the bins of a histogram over (largest logit - logit), and only one bin is sorted. The list grows
// where its tokens hold too little of the mass.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "functions.h"
#include "masses.h"

namespace gptbatch {

// Arrays of one row, which a thread keeps.
class Nucleus {
 public:
  // Clears the tokens. Masses have `bits` bits.
  void begin(float max, double temperature, double top_p, int bits) {
    logits_.clear();
    max_ = max;
    temperature_ = temperature;
    top_p_ = top_p;
    log_odds_ = log_of(top_p / (1.0 - top_p));
    bits_ = bits;
    // Finite at the smallest temperature, too.
    bins_per_unit_ = std::min(N_BINS / (-MIN_MASS_EXPONENT * temperature),
                              std::numeric_limits<double>::max());
  }

  void add(float logit) { logits_.push_back(logit); }

  template <class T>
  void add(const T* logits, int64_t count) {
    const size_t begin = logits_.size();
    logits_.resize(begin + count);
    for (int64_t i = 0; i < count; i++) logits_[begin + i] = static_cast<float>(logits[i]);
  }

  // Calls body(logit, i) for the tokens with low <= logit < high, in the order of their addition.
  template <class F>
  void for_each(double low, double high, const F& body) {
    list_down_to(low);
    for (const Entry& entry : listed_)
      if (entry.logit >= low && entry.logit < high) body(entry.logit, entry.index);
  }

  void compute_masses() {
    const int64_t count = static_cast<int64_t>(logits_.size());
    masses_.resize((count + MASS_CHUNK - 1) / MASS_CHUNK * MASS_CHUNK);
    const double max = max_, temperature = temperature_;
    int64_t total = 0;
    double x[MASS_CHUNK] = {};
    for (int64_t first = 0; first < count; first += MASS_CHUNK) {
      const int64_t size = std::min<int64_t>(MASS_CHUNK, count - first);
      int64_t* masses = masses_.data() + first;
      for (int64_t i = 0; i < size; i++)
        x[i] = (static_cast<double>(logits_[first + i]) - max) / temperature;
      masses_of(x, bits_, masses);
      for (int64_t i = 0; i < size; i++) total += masses[i];
    }
    total_ = total;
    list(FIRST_DEPTH * temperature_);
  }

  float cutoff() { return smallest_kept(top_p_); }

  // The least distance at which a kept token leaves, if it is below `bound`.
  double reach_of_kept(float logit, double bound) {
    list_down_to(static_cast<double>(logit) - bound);
    int64_t mass_above = 0;
    band_.clear();
    for (const Entry& entry : listed_) {
      if (entry.logit > logit)
        mass_above += entry.mass;
      // The difference is exact; `logit - bound` may round up to this logit.
      else if (static_cast<double>(logit) - static_cast<double>(entry.logit) < bound)
        band_.push_back(entry);
    }
    std::sort(band_.begin(), band_.end(), [](const Entry& a, const Entry& b) {
      return a.logit > b.logit;
    });
    double reach = std::max(0.0, distance(mass_above));
    // The first is the token itself.
    for (size_t i = 1; i < band_.size(); i++) {
      mass_above += band_[i].mass;
      const double gap = static_cast<double>(logit) - static_cast<double>(band_[i].logit);
      reach = std::min(reach, std::max(gap, distance(mass_above)));
    }
    return std::max(0.0, reach);
  }

  // The least distance at which a token that is not kept enters, if it is below `bound`.
  double reach_of_outside(float logit, double bound) {
    list_down_to(logit);
    int64_t mass_above = 0;
    band_.clear();
    for (const Entry& entry : listed_) {
      if (!(entry.logit > logit)) continue;
      mass_above += entry.mass;
      if (static_cast<double>(entry.logit) - static_cast<double>(logit) < bound)
        band_.push_back(entry);
    }
    std::sort(band_.begin(), band_.end(), [](const Entry& a, const Entry& b) {
      return a.logit < b.logit;
    });
    double reach = std::max(0.0, -distance(mass_above));
    for (const Entry& entry : band_) {
      mass_above -= entry.mass;
      const double gap = static_cast<double>(entry.logit) - static_cast<double>(logit);
      reach = std::min(reach, std::max(gap, -distance(mass_above)));
    }
    return std::max(0.0, reach);
  }

  // A logit below which no token's reach is below `bound`. SLACK covers the errors of exp.
  double lowest(double bound) {
    const double wide = bound * (1.0 + SLACK) + SLACK;
    const double p = 1.0 / (1.0 + std::exp(-(log_odds_ + wide / temperature_)));
    const double last =
        p < 1.0 ? static_cast<double>(smallest_kept(p))
                : -std::numeric_limits<double>::infinity();
    return last - wide;
  }

 private:
  struct Entry {
    float logit;
    int32_t index;
    int64_t mass;
  };

  static constexpr int N_BINS = 1024;
  // In units of the temperature: a token this far below the largest logit has 1/3000 of its mass.
  static constexpr double FIRST_DEPTH = 8.0;
  static constexpr double INFINITE_DEPTH = std::numeric_limits<double>::infinity();
  static constexpr int32_t CHUNK = 32;
  static constexpr double SLACK = 1e-9;

  // h in nucleus.py.
  double distance(int64_t mass) const {
    const double odds = static_cast<double>(mass) / static_cast<double>(total_ - mass);
    return temperature_ * (log_odds_ - log_of(odds));
  }

  // Lists the tokens at most `depth` below the largest logit.
  void list(double depth) {
    if (!(depth < -MIN_MASS_EXPONENT * temperature_)) depth = INFINITE_DEPTH;
    depth_ = depth;
    listed_.clear();
    bins_.assign(N_BINS, 0);
    listed_mass_ = 0;
    const double max = max_;
    const int32_t count = static_cast<int32_t>(logits_.size());
    for (int32_t first = 0; first < count; first += CHUNK) {
      const int32_t end = std::min(first + CHUNK, count);
      int any = 0;
      for (int32_t i = first; i < end; i++) any |= max - static_cast<double>(logits_[i]) <= depth;
      if (!any) continue;
      int32_t found[CHUNK], n_found = 0;
      for (int32_t i = first; i < end; i++) {
        found[n_found] = i;
        // No branch: it would be mispredicted too often.
        n_found += max - static_cast<double>(logits_[i]) <= depth;
      }
      for (int32_t j = 0; j < n_found; j++) {
        const int32_t i = found[j];
        listed_.push_back({logits_[i], i, masses_[i]});
        listed_mass_ += masses_[i];
        bins_[bin_of(logits_[i])] += masses_[i];
      }
    }
  }

  int bin_of(float logit) const {
    const double depth = (static_cast<double>(max_) - static_cast<double>(logit)) * bins_per_unit_;
    return static_cast<int>(std::min<double>(depth, N_BINS - 1));
  }

  void list_down_to(double logit) {
    const double depth = static_cast<double>(max_) - logit;
    if (!(depth <= depth_)) list(std::max(depth, 2 * depth_));
  }

  // The smallest logit whose larger ones hold less than p of the mass.
  float smallest_kept(double p) {
    const double limit = p * static_cast<double>(total_);
    while (static_cast<double>(listed_mass_) < limit && std::isfinite(depth_)) list(2 * depth_);
    int64_t above = 0;
    int bin = 0;
    while (bin < N_BINS - 1 && static_cast<double>(above + bins_[bin]) < limit)
      above += bins_[bin++];
    band_.clear();
    for (const Entry& entry : listed_)
      if (bin_of(entry.logit) == bin) band_.push_back(entry);
    std::sort(band_.begin(), band_.end(), [](const Entry& a, const Entry& b) {
      return a.logit > b.logit;
    });
    float kept = band_.empty() ? max_ : band_.front().logit;
    for (size_t i = 0; i < band_.size();) {
      if (!(static_cast<double>(above) < limit)) break;
      kept = band_[i].logit;
      while (i < band_.size() && band_[i].logit == kept) above += band_[i++].mass;
    }
    return kept;
  }

  float max_;
  double temperature_, top_p_, log_odds_, bins_per_unit_;
  int bits_;
  // Of all tokens.
  std::vector<float> logits_;
  std::vector<int64_t> masses_;
  int64_t total_;
  // Of the tokens at most depth_ below the largest logit.
  double depth_;
  std::vector<Entry> listed_, band_;
  std::vector<int64_t> bins_;
  int64_t listed_mass_;
};

}  // namespace gptbatch
