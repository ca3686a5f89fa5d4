// Ops that transformer_blocks calls without the dispatcher; ops.cpp describes them.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace gptbatch {

at::Tensor linear_op(const at::Tensor& x, const at::Tensor& packed, int64_t out_features,
                     const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& residual, std::string activation);

at::Tensor layer_norm_op(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         double epsilon);

at::Tensor paged_attention_op(const at::Tensor& qkv, at::Tensor cache,
                              const at::Tensor& block_table, const at::Tensor& seq_indices,
                              const at::Tensor& positions, double scale);

at::Tensor qkv_paged_attention_op(const at::Tensor& x, const at::Tensor& packed,
                                  const at::Tensor& bias, at::Tensor cache,
                                  const at::Tensor& block_table, const at::Tensor& seq_indices,
                                  const at::Tensor& positions, double scale);

}  // namespace gptbatch
