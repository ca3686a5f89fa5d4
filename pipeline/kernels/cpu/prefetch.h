// Prefetching of KV blocks, ahead of the attention that reads them.
//
// Lines are prefetched into L2, which has more outstanding misses than L1, and at a steady rate:
// memory bandwidth is lost while no prefetch is in flight.

#pragma once

#include "simd.h"

namespace gptbatch {

// The prefetch distance: lines that are prefetched ahead of those that are read, at least.
constexpr int64_t MIN_PREFETCH_DISTANCE = 256;

// The cache lines of one head's blocks, in the order in which attention reads them. The unit is
// half a block: its keys or its values.
class BlockPrefetcher {
 public:
  BlockPrefetcher() = default;
  // halves: indices of half blocks of half_bytes each, counted from `head`. Covers
  // halves[first] to halves[end - 1].
  BlockPrefetcher(const void* head, const int32_t* halves, int64_t half_bytes, int64_t first,
                  int64_t end)
      : head_(static_cast<const char*>(head)),
        halves_(halves),
        lines_per_half_(half_bytes / CACHE_LINE_BYTES),
        half_(first),
        end_(end) {}

  // Lines that are left before halves[half].
  int64_t lines_until(int64_t half) const { return (half - half_) * lines_per_half_ - line_; }

  // Calls visit(address) for the next `count` lines, or all that are left.
  template <class F>
  void take(int64_t count, const F& visit) {
    while (count > 0 && half_ < end_) {
      const int64_t n = std::min(count, lines_per_half_ - line_);
      const char* line = head_ + (halves_[half_] * lines_per_half_ + line_) * CACHE_LINE_BYTES;
      for (int64_t i = 0; i < n; i++) visit(line + i * CACHE_LINE_BYTES);
      count -= n;
      line_ += n;
      if (line_ == lines_per_half_) line_ = 0, half_++;
    }
  }

  void prefetch(int64_t count) {
    take(count, [](const char* line) { __builtin_prefetch(line, 0, 2); });
  }

  // Sets the prefetch rate: `lines` lines while `halves` half blocks are read.
  void set_rate(int64_t halves, int64_t lines) {
    rate_ = halves > 0 ? std::max<int64_t>(0, (lines + halves - 1) / halves) : 0;
  }
  // Lines to prefetch per half block that is read.
  int64_t rate() const { return rate_; }

 private:
  const char* head_ = nullptr;
  const int32_t* halves_ = nullptr;
  int64_t lines_per_half_ = 0, half_ = 0, line_ = 0, end_ = 0, rate_ = 0;
};

}  // namespace gptbatch
