// The linear layer: y = activation(x W^T + b) or x W^T + b + residual, each number's sum in one fixed order.
//
//     gptbatch::pack_weight(weight) -> packed
//     gptbatch::linear(x, packed, out_features, bias, residual, activation) -> y
//     gptbatch::linear_float32_out(x, packed, y): the same into y, float32 where x is bfloat16
//
//     weight    (out, in)              float32 or bfloat16
//     packed    (panels, in, COLUMNS)  the columns of W^T in panels of COLUMNS, zeros after the last; in bfloat16 two rows of W^T
//                                      stand interleaved (in is rounded up to a multiple of 2, with AMX of 32)
//     x         (N, in)                y and residual (N, out), bias (out,) float32
//
// A number of y is a sum over the inputs 0, 1, 2, ... by fused multiply-add in float32 (in bfloat16 by the CPU's dot product of
// pairs, or by its product of matrices, AMX, 32 inputs a time), then bias, activation or residual, and is rounded once: it depends on
// its row of x alone, whatever the number of rows and threads. bfloat16 needs AVX512_BF16: `has_bfloat16` says whether it is there.
//
// A panel comes from memory once for each ROWS_AT_ONCE rows. While a thread works on one, it asks for the next one of its own; the
// hardware does not look so far ahead, and at 64 rows waiting for weights would take a sixth of the time.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "gemm.h"

namespace {

using namespace gptbatch;

template <class T, class Y>
void run(const at::Tensor& x, const at::Tensor& packed, const float* bias, const Y* residual, Activation activation, at::Tensor& y) {
  const int64_t rows = x.size(0), in = x.size(1), panels = packed.size(0), out = y.size(1), panel_size = in * COLUMNS;
  const T *inputs = x.const_data_ptr<T>(), *weights = packed.const_data_ptr<T>();
  Y* outputs = y.data_ptr<Y>();
  // chunks of about equal size: a small one would wait for its weights
  const int64_t chunks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, items = chunks * panels;
  const int64_t most = Tiles<T>::most_rows(), chunk_rows = ((rows + chunks - 1) / chunks + most - 1) / most * most;
  const int64_t threads = rows * in * out < SMALL ? 1 : at::get_num_threads();
  const auto work = [&](int64_t item) {
    const int64_t chunk = item / panels, panel = item % panels, column = panel * COLUMNS;
    const int64_t first = std::min(rows, chunk * chunk_rows), last = std::min(rows, first + chunk_rows);
    // the panel that this thread is likely to take next
    const T* next = weights + std::min(panel + threads, panels - 1) * panel_size;
    const Tiles<T> tiles(inputs + first * in, last - first, in);
    for (int64_t tile = 0; tile < tiles.count(); tile++) {
      const int64_t at = (first + tiles.first_row(tile)) * out + column;
      const Ending<Y> ending{bias == nullptr ? nullptr : bias + column, residual == nullptr ? nullptr : residual + at, outputs + at, out,
                             std::min(COLUMNS, out - column), activation};
      tiles.template multiply<0>(tile, weights + panel * panel_size, next, nullptr, ending);
    }
  };
  if (threads == 1) {
    for (int64_t item = 0; item < items; item++) work(item);
  } else {
    for_each(items, 1, work);
  }
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, int64_t out_features, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& residual, std::string activation) {
  const at::Tensor inputs = fitting(x, packed, out_features);
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == out_features), "linear: bias");
  at::Tensor y = at::empty({x.size(0), out_features}, x.options());
  const at::Tensor added = residual ? residual->contiguous() : at::Tensor();
  TORCH_CHECK(!residual || (added.sizes() == y.sizes() && added.scalar_type() == y.scalar_type()), "linear: residual");
  if (x.size(0) == 0) return y;
  const float* b = bias ? bias->const_data_ptr<float>() : nullptr;
  if (x.scalar_type() == at::kFloat) {
    run<float, float>(inputs, packed, b, residual ? added.const_data_ptr<float>() : nullptr, parse(activation), y);
  } else {
#ifdef __AVX512BF16__
    run<at::BFloat16, at::BFloat16>(inputs, packed, b, residual ? added.const_data_ptr<at::BFloat16>() : nullptr, parse(activation), y);
#endif
  }
  return y;
}

void linear_float32_out(const at::Tensor& x, const at::Tensor& packed, at::Tensor& y) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && y.scalar_type() == at::kFloat && y.is_contiguous() && y.size(0) == x.size(0),
              "linear_float32_out: the types or shapes do not fit");
  const at::Tensor inputs = fitting(x, packed, y.size(1));
#ifdef __AVX512BF16__
  if (x.size(0) > 0) run<at::BFloat16, float>(inputs, packed, nullptr, nullptr, Activation::none, y);
#endif
}

template <class T>
void fill(const at::Tensor& weight, int64_t depth, at::Tensor& packed) {
  const int64_t out = weight.size(0), in = weight.size(1), padded = packed.size(1);
  const T* from = weight.const_data_ptr<T>();
  T* to = packed.data_ptr<T>();
  for_each(packed.size(0), 1, [&](int64_t panel) {
    for (int64_t c = 0; c < std::min(COLUMNS, out - panel * COLUMNS); c++)
      for (int64_t k = 0; k < in; k++)
        to[panel * padded * COLUMNS + k / depth * depth * COLUMNS + c * depth + k % depth] = from[(panel * COLUMNS + c) * in + k];
  });
}

at::Tensor pack_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "pack_weight: a contiguous matrix is needed");
  const bool wide = weight.scalar_type() == at::kFloat;
  TORCH_CHECK(wide || (HAS_BFLOAT16 && weight.scalar_type() == at::kBFloat16), "pack_weight: float32, or bfloat16 where the CPU computes in it");
  const int64_t multiple = wide ? 1 : BFLOAT16_INPUTS, in = (weight.size(1) + multiple - 1) / multiple * multiple;
  at::Tensor packed = at::zeros({(weight.size(0) + COLUMNS - 1) / COLUMNS, in, COLUMNS}, weight.options());
  if (wide) {
    fill<float>(weight, 1, packed);
  } else {
    fill<at::BFloat16>(weight, 2, packed);
  }
  return packed;
}

bool has_bfloat16() { return HAS_BFLOAT16; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, int out_features, Tensor? bias, Tensor? residual, str activation) -> Tensor");
  library.def("linear_float32_out(Tensor x, Tensor packed, Tensor(a!) y) -> ()");
  library.def("has_bfloat16() -> bool", has_bfloat16);
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) {
  library.impl("pack_weight", pack_weight);
  library.impl("linear", linear);
  library.impl("linear_float32_out", linear_float32_out);
}
