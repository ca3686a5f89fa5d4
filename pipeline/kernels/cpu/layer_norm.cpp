// Layer normalization (Ba, Kiros and Hinton 2016) of each row.
//
//     mean = sum(x) / C
//     variance = sum((x - mean)^2) / C
//     y = (x - mean) * (1 / sqrt(variance + epsilon)) * weight + bias
//
// Sums are in float32, in 32 lanes: element c is added to lane c % 32. A fixed tree then adds the
// lanes (LogicalLanes). Each element of y is rounded to its dtype once. A row of y depends on the
// same row of x only.

#include <cmath>

#include "simd.h"
#include "threads.h"

namespace gptbatch {
namespace {

constexpr int64_t NORM_ROWS_PER_GRAIN = 4;
constexpr int64_t MIN_PARALLEL_ELEMENTS = 1 << 13;  // less work is not worth waking threads

// Calls work(v, d, vector, count) for each LANES elements of x from d on. `count` is how many
// elements are left; where fewer than LANES are, the other lanes are 0. v is the vector of their
// logical lanes.
template <class T, class F>
inline void for_each_vector(const T* x, int64_t width, const F& work) {
  for (int64_t begin = 0; begin < width; begin += LogicalLanes::COUNT) {
    UNROLL
    for (int v = 0; v < LogicalLanes::VECTORS; v++) {
      const int64_t d = begin + v * LANES;
      if (d >= width) break;
      work(v, d, load(x + d, width - d), width - d);
    }
  }
}

template <class T>
void normalize_row(const T* x, int64_t width, const T* weight, const T* bias, double epsilon,
                   T* y) {
  LogicalLanes sums, squares;
  for_each_vector(x, width, [&](int v, int64_t, Vec own, int64_t) {
    sums.lanes[v] = sums.lanes[v] + own;
  });
  const float mean = sums.total() / static_cast<float>(width);
  for_each_vector(x, width, [&](int v, int64_t, Vec own, int64_t count) {
    const Vec distance = own - mean;
    squares.lanes[v] = squares.lanes[v] + first_lanes(distance * distance, count);
  });
  const double variance = squares.total() / static_cast<double>(width);
  const float factor = static_cast<float>(1.0 / std::sqrt(variance + epsilon));
  for_each_vector(x, width, [&](int, int64_t d, Vec own, int64_t count) {
    const Vec scaled = (own - mean) * factor * load(weight + d, count);
    store(y + d, scaled + load(bias + d, count), count);
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
