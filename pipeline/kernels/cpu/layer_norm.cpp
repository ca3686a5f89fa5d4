// Layer normalization (Ba, Kiros and Hinton 2016) of each row.
//
//     mean = sum(x) / C
//     variance = sum((x - mean)^2) / C
//     y = (x - mean) * (1 / sqrt(variance + epsilon)) * weight + bias
//
// Sums are in float32, in 32 lanes: element c is added to lane c % 32. A fixed tree then adds the
// lanes (LogicalLanes). Each element of y is
// rounded to its dtype once. A row of y depends on the same row of x only.

#include <cmath>

#include "simd.h"
#include "threads.h"

namespace gptbatch {
namespace {

constexpr int64_t NORM_ROWS_PER_GRAIN = 4;
constexpr int64_t MIN_PARALLEL_ELEMENTS = 1 << 13;  // less work is not worth waking threads

// Calls work(v, d, low, high, count) for each 2 * LANES elements of x from d on. `count` of them
// are in the row; the others are 0. v is the first vector of their logical lanes.
template <class T, class F>
inline void for_each_pair(const T* x, int64_t width, const F& work) {
  for (int64_t begin = 0; begin < width; begin += LogicalLanes::COUNT) {
    UNROLL
    for (int v = 0; v < LogicalLanes::VECTORS; v += 2) {
      const int64_t d = begin + v * LANES;
      if (d >= width) break;
      const auto [low, high] = load_pair(x + d, width - d);
      work(v, d, low, high, std::min(2 * LANES, width - d));
    }
  }
}

template <class T>
void normalize_row(const T* x, int64_t width, const T* weight, const T* bias, double epsilon,
                   T* y) {
  LogicalLanes sums, squares;
  for_each_pair(x, width, [&](int v, int64_t, const Vec& low, const Vec& high, int64_t) {
    sums.lanes[v] = sums.lanes[v] + low;
    sums.lanes[v + 1] = sums.lanes[v + 1] + high;
  });
  const Vec mean(sums.total() / static_cast<float>(width));
  for_each_pair(x, width, [&](int v, int64_t, const Vec& low, const Vec& high, int64_t count) {
    const Vec a = low - mean, b = high - mean;
    squares.lanes[v] = squares.lanes[v] + Vec::set(Vec(0.0f), a * a, std::min(LANES, count));
    squares.lanes[v + 1] =
        squares.lanes[v + 1] + Vec::set(Vec(0.0f), b * b, std::max<int64_t>(0, count - LANES));
  });
  const double variance = squares.total() / static_cast<double>(width);
  const Vec factor(static_cast<float>(1.0 / std::sqrt(variance + epsilon)));
  for_each_pair(x, width, [&](int, int64_t d, const Vec& low, const Vec& high, int64_t count) {
    const auto [weight_low, weight_high] = load_pair(weight + d, count);
    const auto [bias_low, bias_high] = load_pair(bias + d, count);
    store_pair((low - mean) * factor * weight_low + bias_low,
               (high - mean) * factor * weight_high + bias_high, y + d, count);
  });
}

}  // namespace

template <class T>
void layer_norm(const T* x, int64_t rows, int64_t width, const T* weight, const T* bias,
                double epsilon, T* y) {
  const auto work = [&](int64_t row) {
    normalize_row(x + row * width, width, weight, bias, epsilon, y + row * width);
  };
  if (rows * width < MIN_PARALLEL_ELEMENTS) {
    const StandardFloatMode mode;
    for (int64_t row = 0; row < rows; row++) work(row);
  } else {
    parallel_for_each(rows, NORM_ROWS_PER_GRAIN, work);
  }
}

template void layer_norm(const float*, int64_t, int64_t, const float*, const float*, double,
                         float*);
template void layer_norm(const BFloat16*, int64_t, int64_t, const BFloat16*, const BFloat16*,
                         double, BFloat16*);

}  // namespace gptbatch
