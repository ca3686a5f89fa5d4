// The blocks of the network, one after the other, in one call: the numbers that pipeline/model/blocks.py makes operator by operator.
//
//     gptbatch::transformer_blocks(x, weights, epsilon, activation, caches, scales, pages, slots, positions, wanted) -> y
//
//     x           (R, C)
//     weights     of each block, in the order of `Weights`; packed as linear.cpp has it, the projection in the order (H, 3, D)
//     epsilon     of the norms
//     activation  of the MLP
//     caches      of each block; pages, slots and positions of all: as in attention.cpp
//     scales      of each block's attention
//     wanted      (S,) int64: the tokens for which the last block computes what comes after its attention; none for all
//     y           (R, C), or (S, C)
//
// In a decode step an operator takes a millisecond or less, and called from Python each would come late: the interpreter has left the
// CPU's cache whenever weights have passed through.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>

#include "epilogue.h"

namespace {

using namespace gptbatch;
using at::Tensor;
using Maybe = std::optional<Tensor>;

// Heads are dealt out in rounds, one for each thread; rounds times threads is at most so many times the heads.
constexpr double MOST_ROUNDS = 1.1;

struct Weights {
  static constexpr int64_t COUNT = 12;
  const Tensor &norm_1, &bias_1, &qkv, &qkv_bias, &out, &out_bias, &norm_2, &bias_2, &mlp_in, &mlp_in_bias, &mlp_out, &mlp_out_bias;

  explicit Weights(at::TensorList of_block)
      : norm_1(of_block[0]),
        bias_1(of_block[1]),
        qkv(of_block[2]),
        qkv_bias(of_block[3]),
        out(of_block[4]),
        out_bias(of_block[5]),
        norm_2(of_block[6]),
        bias_2(of_block[7]),
        mlp_in(of_block[8]),
        mlp_in_bias(of_block[9]),
        mlp_out(of_block[10]),
        mlp_out_bias(of_block[11]) {}
};

// An operator as torch's dispatcher knows it, so that a profiler sees it, too.
template <class F>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon) {
  static const auto call = find<Tensor(const Tensor&, const Tensor&, const Tensor&, double)>("gptbatch::layer_norm");
  return call.call(x, weight, bias, epsilon);
}

Tensor linear(const Tensor& x, const Tensor& packed, const Tensor& bias, const Maybe& residual, const std::string& activation) {
  static const auto call = find<Tensor(const Tensor&, const Tensor&, int64_t, const Maybe&, const Maybe&, std::string)>("gptbatch::linear");
  return call.call(x, packed, bias.numel(), bias, residual, activation);
}

// Whether threads may each take whole heads, projection and all: where these are of whole panels, and few threads are idle in the last
// round. With one round alone there would be no head before, whose pages are asked for.
bool head_by_head(int64_t heads, int64_t head_size) {
  const int64_t threads = at::get_num_threads(), rounds = (heads + threads - 1) / threads;
  return 3 * head_size % COLUMNS == 0 && rounds > 1 && static_cast<double>(rounds * threads) <= MOST_ROUNDS * static_cast<double>(heads);
}

Tensor attention(const Tensor& x, const Weights& weights, const Tensor& cache, const Tensor& pages, const Tensor& slots,
                 const Tensor& positions, double scale) {
  static const auto fused = find<Tensor(const Tensor&, const Tensor&, const Tensor&, Tensor, const Tensor&, const Tensor&, const Tensor&,
                                        double)>("gptbatch::qkv_paged_attention");
  static const auto attend = find<Tensor(const Tensor&, Tensor, const Tensor&, const Tensor&, const Tensor&, double)>("gptbatch::paged_attention");
  const int64_t heads = cache.size(0), head_size = heads == 0 ? 0 : weights.qkv_bias.numel() / (3 * heads);
  TORCH_CHECK(heads > 0 && weights.qkv_bias.numel() == 3 * heads * head_size, "transformer_blocks: the heads of the cache do not fit the projection");
  if (head_by_head(heads, head_size)) return fused.call(x, weights.qkv, weights.qkv_bias, cache, pages, slots, positions, scale);
  const Tensor qkv = linear(x, weights.qkv, weights.qkv_bias, std::nullopt, "none").view({x.size(0), heads, 3, head_size}).transpose(1, 2);
  return attend.call(qkv, cache, pages, slots, positions, scale);
}

Tensor transformer_blocks(const Tensor& x, at::TensorList weights, double epsilon, std::string activation, at::TensorList caches,
              at::ArrayRef<double> scales, const Tensor& pages, const Tensor& slots, const Tensor& positions, const Maybe& wanted) {
  const size_t count = caches.size();
  TORCH_CHECK(count > 0 && weights.size() == count * Weights::COUNT && scales.size() == count, "transformer_blocks: ", weights.size(), " weights, ", count,
              " caches and ", scales.size(), " scales do not fit each other");
  Tensor y = x;
  for (size_t layer = 0; layer < count; layer++) {
    const Weights of_block(weights.slice(layer * Weights::COUNT, Weights::COUNT));
    Tensor attended =
        attention(layer_norm(y, of_block.norm_1, of_block.bias_1, epsilon), of_block, caches[layer], pages, slots, positions, scales[layer]);
    if (wanted && layer + 1 == count) {
      y = y.index_select(0, *wanted);
      attended = attended.index_select(0, *wanted);
    }
    y = linear(attended, of_block.out, of_block.out_bias, y, "none");
    const Tensor normed = layer_norm(y, of_block.norm_2, of_block.bias_2, epsilon);
    const Tensor inner = linear(normed, of_block.mlp_in, of_block.mlp_in_bias, std::nullopt, activation);
    y = linear(inner, of_block.mlp_out, of_block.mlp_out_bias, y, "none");
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def(
      "transformer_blocks(Tensor x, Tensor[] weights, float epsilon, str activation, Tensor(a!)[] caches, float[] scales, Tensor pages, Tensor slots, "
      "Tensor positions, Tensor? wanted) -> Tensor");
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) { library.impl("transformer_blocks", transformer_blocks); }
