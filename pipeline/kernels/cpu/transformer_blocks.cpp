// All transformer blocks of the model in one op: what `BlockStack` in pipeline/model/gpt.py
// computes op by op.
//
//     transformer_blocks(x, weights, epsilon, activation, caches, scales, block_table, seq_indices,
//                        positions, logits_indices) -> y
//         x               (R, C)
//         weights         12 tensors per block, in the order of BlockWeights; packed as in ops.cpp,
//                         qkv with columns in the order (H, 3, D)
//         epsilon         of the layer norms
//         activation      of the MLP
//         caches, scales  one per block; block_table, seq_indices and positions as in ops.cpp
//         logits_indices  (S,) int64: tokens whose final hidden states are needed; None: all.
//                         After the attention of the last block, only these are computed
//         y               (R, C), or (S, C)
//     runs_by_head(heads, head_size) -> whether projection and attention are one kernel
//
//     for (block : blocks) {
//       x = x + out(attention(qkv(layer_norm_1(x))));
//       x = x + mlp_out(activation(mlp_in(layer_norm_2(x))));
//     }
//
// In a decode step an op takes a millisecond or less. Calls from Python would add a delay to each:
// the weights that pass through the CPU's cache evict the interpreter.

#include <ATen/record_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "threads.h"

namespace gptbatch {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// qkv_paged_attention deals heads out in rounds of one per thread. It is used if rounds * threads
// is at most this multiple of the heads, so that few threads have nothing to do in the last round.
constexpr double MAX_LOAD_IMBALANCE = 1.1;

struct BlockWeights {
  static constexpr int64_t COUNT = 12;
  const Tensor &norm_1, &norm_1_bias, &qkv, &qkv_bias, &out, &out_bias;
  const Tensor &norm_2, &norm_2_bias, &mlp_in, &mlp_in_bias, &mlp_out, &mlp_out_bias;

  explicit BlockWeights(at::TensorList w)
      : norm_1(w[0]),
        norm_1_bias(w[1]),
        qkv(w[2]),
        qkv_bias(w[3]),
        out(w[4]),
        out_bias(w[5]),
        norm_2(w[6]),
        norm_2_bias(w[7]),
        mlp_in(w[8]),
        mlp_in_bias(w[9]),
        mlp_out(w[10]),
        mlp_out_bias(w[11]) {}
};

struct BlockTokens {
  const Tensor &block_table, &seq_indices, &positions;
};

// The ops are called directly. RECORD_FUNCTION shows them to torch.profiler under their names.
using Inputs = std::vector<c10::IValue>;

Tensor run_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon) {
  RECORD_FUNCTION("gptbatch::layer_norm", Inputs({x, weight, bias}));
  return layer_norm_op(x, weight, bias, epsilon);
}

Tensor run_linear(const Tensor& x, const Tensor& packed, const Tensor& bias,
                  const OptionalTensor& residual, const std::string& activation) {
  RECORD_FUNCTION("gptbatch::linear", Inputs({x, packed}));
  return linear_op(x, packed, bias.numel(), bias, residual, activation);
}

// Whether each thread takes whole heads, projection included. A head's columns must fill whole
// panels. With a single round there is no previous head whose KV blocks a GEMM could prefetch.
bool runs_by_head(int64_t heads, int64_t head_size) {
  const int64_t threads = max_threads(), rounds = (heads + threads - 1) / threads;
  return 3 * head_size % panel_columns() == 0 && rounds > 1 &&
         static_cast<double>(rounds * threads) <= MAX_LOAD_IMBALANCE * static_cast<double>(heads);
}

Tensor run_attention(const Tensor& x, const BlockWeights& weights, const Tensor& cache,
                     const BlockTokens& tokens, double scale) {
  const auto& [block_table, seq_indices, positions] = tokens;
  const int64_t heads = cache.size(0), columns = weights.qkv_bias.numel();
  const int64_t head_size = heads == 0 ? 0 : columns / (3 * heads);
  TORCH_CHECK(heads > 0 && columns == 3 * heads * head_size,
              "transformer_blocks: a cache of ", heads, " heads does not fit a projection to ",
              columns, " columns");
  if (runs_by_head(heads, head_size)) {
    RECORD_FUNCTION("gptbatch::qkv_paged_attention", Inputs({x, weights.qkv}));
    return qkv_paged_attention_op(x, weights.qkv, weights.qkv_bias, cache, block_table, seq_indices,
                                  positions, scale);
  }
  const Tensor qkv = run_linear(x, weights.qkv, weights.qkv_bias, std::nullopt, "none")
                         .view({x.size(0), heads, 3, head_size})
                         .transpose(1, 2);
  RECORD_FUNCTION("gptbatch::paged_attention", Inputs({qkv}));
  return paged_attention_op(qkv, cache, block_table, seq_indices, positions, scale);
}

Tensor transformer_blocks_op(const Tensor& x, at::TensorList weights, double epsilon,
                             std::string activation, at::TensorList caches,
                             at::ArrayRef<double> scales, const Tensor& block_table,
                             const Tensor& seq_indices, const Tensor& positions,
                             const OptionalTensor& logits_indices) {
  const size_t count = caches.size();
  TORCH_CHECK(count > 0 && weights.size() == count * BlockWeights::COUNT && scales.size() == count,
              "transformer_blocks: ", weights.size(), " weights, ", count, " caches and ",
              scales.size(), " scales do not fit; each block takes ", BlockWeights::COUNT,
              " weights, one cache and one scale");
  const BlockTokens tokens{block_table, seq_indices, positions};
  Tensor y = x;
  for (size_t layer = 0; layer < count; layer++) {
    const BlockWeights block(weights.slice(layer * BlockWeights::COUNT, BlockWeights::COUNT));
    Tensor attended = run_attention(run_norm(y, block.norm_1, block.norm_1_bias, epsilon), block,
                                     caches[layer], tokens, scales[layer]);
    if (logits_indices && layer + 1 == count) {
      y = y.index_select(0, *logits_indices);
      attended = attended.index_select(0, *logits_indices);
    }
    y = run_linear(attended, block.out, block.out_bias, y, "none");
    const Tensor normed = run_norm(y, block.norm_2, block.norm_2_bias, epsilon);
    const Tensor inner =
        run_linear(normed, block.mlp_in, block.mlp_in_bias, std::nullopt, activation);
    y = run_linear(inner, block.mlp_out, block.mlp_out_bias, y, "none");
  }
  return y;
}

}  // namespace
}  // namespace gptbatch

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def("runs_by_head(int heads, int head_size) -> bool", gptbatch::runs_by_head);
  library.def(
      "transformer_blocks(Tensor x, Tensor[] weights, float epsilon, str activation, "
      "Tensor(a!)[] caches, float[] scales, Tensor block_table, Tensor seq_indices, "
      "Tensor positions, Tensor? logits_indices) -> Tensor");
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) {
  library.impl("transformer_blocks", gptbatch::transformer_blocks_op);
}
