// What both kinds of pages (full_pages.h, int8_pages.h) share.

#pragma once

#include <vector>

#include "common.h"

namespace gptbatch {

constexpr int QUERIES = 4;  // of one sequence, at most, that go over the pages together

// Room that a thread keeps from one call to the next.
struct Scratch {
  std::vector<float> numbers;
  std::vector<int32_t> words;
};

inline float largest_of(const Vec& numbers) {  // NaN where one is
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, numbers);
}

}  // namespace gptbatch
