// Top-p sampling: the cutoff on logits, and its part of the decision margin.
//
// pipeline/engine/nucleus.py defines masses, cutoff and reach. Naive code for the cutoff:
//
//     sort tokens by logit, largest first; above = 0;
//     for (token of the order)
//       if (above of the larger logits < top_p * total) cutoff = logit;
//
// Only one bin of a histogram over (largest logit - logit) is sorted.

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
  }

  void add(float logit) { logits_.push_back(logit); }

  template <class T>
  void add(const T* logits, int64_t count) {
    const size_t begin = logits_.size();
    logits_.resize(begin + count);
    for (int64_t i = 0; i < count; i++) logits_[begin + i] = static_cast<float>(logits[i]);
  }

  // A token below this has no mass.
  double lowest_with_mass() const { return static_cast<double>(max_) + MIN_MASS_EXPONENT * temperature_; }

  void compute_masses() {
    const int64_t count = static_cast<int64_t>(logits_.size());
    masses_.resize(count);
    bin_of_.resize(count);
    bins_.assign(N_BINS, 0);
    const double max = max_, temperature = temperature_;
    const double bins_per_unit = N_BINS / (-MIN_MASS_EXPONENT * temperature);
    for (int64_t first = 0; first < count; first += MASS_CHUNK) {
      const int64_t size = std::min<int64_t>(MASS_CHUNK, count - first);
      double x[MASS_CHUNK] = {};
      int64_t masses[MASS_CHUNK];
      for (int64_t i = 0; i < size; i++)
        x[i] = (static_cast<double>(logits_[first + i]) - max) / temperature;
      masses_of(x, bits_, masses);
      for (int64_t i = 0; i < size; i++) {
        const double depth = (max - static_cast<double>(logits_[first + i])) * bins_per_unit;
        const int bin = static_cast<int>(std::min<double>(depth, N_BINS - 1));
        masses_[first + i] = masses[i];
        bin_of_[first + i] = bin;
        bins_[bin] += masses[i];
      }
    }
    total_ = 0;
    for (const int64_t in_bin : bins_) total_ += in_bin;
  }

  float cutoff() { return smallest_kept(top_p_); }

  // The least distance at which a kept token leaves, if it is below `bound`.
  double reach_of_kept(float logit, double bound) {
    int64_t mass_above = 0;
    band_.clear();
    for (size_t i = 0; i < logits_.size(); i++) {
      if (logits_[i] > logit)
        mass_above += masses_[i];
      // The difference is exact; `logit - bound` may round up to this logit.
      else if (static_cast<double>(logit) - static_cast<double>(logits_[i]) < bound)
        band_.push_back({logits_[i], masses_[i]});
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
    int64_t mass_above = 0;
    band_.clear();
    for (size_t i = 0; i < logits_.size(); i++) {
      if (!(logits_[i] > logit)) continue;
      mass_above += masses_[i];
      if (static_cast<double>(logits_[i]) - static_cast<double>(logit) < bound)
        band_.push_back({logits_[i], masses_[i]});
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
    int64_t mass;
  };

  static constexpr int N_BINS = 1024;
  static constexpr double SLACK = 1e-9;

  // h in nucleus.py.
  double distance(int64_t mass) const {
    const double odds = static_cast<double>(mass) / static_cast<double>(total_ - mass);
    return temperature_ * (log_odds_ - log_of(odds));
  }

  // The smallest logit whose larger ones hold less than p of the mass.
  float smallest_kept(double p) {
    const double limit = p * static_cast<double>(total_);
    int64_t above = 0;
    int bin = 0;
    while (bin < N_BINS - 1 && static_cast<double>(above + bins_[bin]) < limit)
      above += bins_[bin++];
    band_.clear();
    for (size_t i = 0; i < logits_.size(); i++)
      if (bin_of_[i] == bin) band_.push_back({logits_[i], masses_[i]});
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
  double temperature_, top_p_, log_odds_;
  int bits_;
  int64_t total_;
  std::vector<float> logits_;
  std::vector<int64_t> masses_, bins_;
  std::vector<int32_t> bin_of_;
  std::vector<Entry> band_;
};

}  // namespace gptbatch
