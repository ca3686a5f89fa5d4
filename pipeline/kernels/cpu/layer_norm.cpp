// Layer normalisation of each row: y = (x - mean) / sqrt(variance + epsilon) * weight + bias.
//
//     gptbatch::layer_norm(x, weight, bias, epsilon) -> y
//
//     x, y          (N, C)  float32 or bfloat16
//     weight, bias  (C,)    of the same type
//
// Sums are in float32, lane by lane over the row and then over the lanes, and each number of y is rounded once: a row depends on
// nothing but itself.

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

#include "common.h"

namespace {

using namespace gptbatch;

constexpr int64_t FEW = 4;          // rows that a thread takes at a time
constexpr int64_t SMALL = 1 << 13;  // numbers that are not worth waking the other threads for

// Calls work(d, low, high, count) for the next 2 * LANES numbers from d on, of which `count` are of the row and the others 0.
template <class T, class F>
inline void for_pairs(const T* x, int64_t width, const F& work) {
  for (int64_t d = 0; d < width; d += 2 * LANES) {
    const auto [low, high] = load_pair(x + d, width - d);
    work(d, low, high, std::min(2 * LANES, width - d));
  }
}

template <class T>
void normalise(const T* x, int64_t width, const T* weight, const T* bias, double epsilon, T* y) {
  Vec first(0.0f), second(0.0f);
  for_pairs(x, width, [&](int64_t, const Vec& low, const Vec& high, int64_t) { first = first + low, second = second + high; });
  const Vec mean(sum_of(first + second) / static_cast<float>(width));
  first = second = Vec(0.0f);
  for_pairs(x, width, [&](int64_t, const Vec& low, const Vec& high, int64_t count) {
    const Vec a = low - mean, b = high - mean;
    first = first + Vec::set(Vec(0.0f), a * a, std::min(LANES, count));
    second = second + Vec::set(Vec(0.0f), b * b, std::max<int64_t>(0, count - LANES));
  });
  const double variance = sum_of(first + second) / static_cast<double>(width);
  const Vec factor(static_cast<float>(1.0 / std::sqrt(variance + epsilon)));
  for_pairs(x, width, [&](int64_t d, const Vec& low, const Vec& high, int64_t count) {
    const auto [weight_low, weight_high] = load_pair(weight + d, count);
    const auto [bias_low, bias_high] = load_pair(bias + d, count);
    const Vec a = (low - mean) * factor * weight_low + bias_low, b = (high - mean) * factor * weight_high + bias_high;
    if constexpr (std::is_same_v<T, float>) {
      a.store(y + d, std::min(LANES, count));
      if (count > LANES) b.store(y + d + LANES, count - LANES);
    } else {
      at::vec::convert_from_float<T>(a, b).store(y + d, count);
    }
  });
}

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double epsilon) {
  const int64_t rows = x.size(0), width = x.size(1);
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && weight.is_contiguous() && bias.is_contiguous() && weight.numel() == width &&
                  bias.numel() == width && weight.scalar_type() == x.scalar_type() && bias.scalar_type() == x.scalar_type(),
              "layer_norm: the shapes or types do not fit each other");
  at::Tensor y = at::empty_like(x);
  const auto with = [&](auto number) {
    using T = decltype(number);
    const T *from = x.const_data_ptr<T>(), *by = weight.const_data_ptr<T>(), *plus = bias.const_data_ptr<T>();
    T* to = y.data_ptr<T>();
    const auto work = [&](int64_t row) { normalise(from + row * width, width, by, plus, epsilon, to + row * width); };
    if (x.numel() < SMALL) {
      for (int64_t row = 0; row < rows; row++) work(row);
    } else {
      for_each(rows, FEW, work);
    }
  };
  x.scalar_type() == at::kFloat ? with(float()) : with(at::BFloat16());
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) { library.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon) -> Tensor"); }

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) { library.impl("layer_norm", layer_norm); }
