// What both kinds of pages (kv_blocks_full.h, kv_blocks_int8.h) share.

#pragma once

#include <vector>

#include "common.h"

namespace gptbatch {

constexpr int QUERIES = 4;     // of one sequence, at most, that go over the pages together
constexpr int64_t LEAD = 256;  // lines at least that are to be asked for ahead of those that are read

// Room that a thread keeps from one call to the next.
struct Scratch {
  std::vector<float> numbers;
  std::vector<int32_t> words;
};

// The lines of one head's pages that a thread is about to read, in the order in which it will. They are asked for before, into the second
// cache, which can wait for more lines at once than the first; and evenly, as memory is idle while nothing is asked for.
class Lookahead {
 public:
  Lookahead() = default;
  // halves: the numbers of half pages, each of half_bytes, counted from `head`. It goes from halves[first] to before halves[end].
  Lookahead(const void* head, const int32_t* halves, int64_t half_bytes, int64_t first, int64_t end)
      : head_(static_cast<const char*>(head)), halves_(halves), lines_(half_bytes / CACHE_LINE), half_(first), end_(end) {}

  // How many lines there are before halves[half].
  int64_t lines_to(int64_t half) const { return (half - half_) * lines_ - line_; }

  // Calls with each of the next `count` lines, or of as many as are left.
  template <class F>
  void next(int64_t count, const F& with) {
    while (count > 0 && half_ < end_) {
      const int64_t some = std::min(count, lines_ - line_);
      const char* line = head_ + (halves_[half_] * lines_ + line_) * CACHE_LINE;
      for (int64_t i = 0; i < some; i++) with(line + i * CACHE_LINE);
      count -= some;
      line_ += some;
      if (line_ == lines_) line_ = 0, half_++;
    }
  }

  void ask(int64_t count) {
    next(count, [](const char* line) { __builtin_prefetch(line, 0, 2); });
  }

  // How many lines whoever reads a half page is to ask for meanwhile: so many that `lines` are asked for when `halves` are read.
  void set_pace(int64_t halves, int64_t lines) { pace_ = halves > 0 ? std::max<int64_t>(0, (lines + halves - 1) / halves) : 0; }
  int64_t pace() const { return pace_; }

 private:
  const char* head_ = nullptr;
  const int32_t* halves_ = nullptr;
  int64_t lines_ = 0, half_ = 0, line_ = 0, end_ = 0, pace_ = 0;
};

inline float largest_of(const Vec& numbers) {  // NaN where one is
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, numbers);
}

}  // namespace gptbatch
