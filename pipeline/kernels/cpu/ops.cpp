// The ops torch.ops.gptbatch.*: checks of shapes and dtypes, output tensors, registration.
//
// Letters: N tokens, R >= N rows (the tokens, then padding), S tokens whose logits are needed, C
// width, H heads, D head size, V vocabulary size. float is float32 or bfloat16. Weights are packed
// by pack_weight: (panels, in, NR), columns of W^T in panels of NR, padded with 0. In bfloat16 two
// rows of W^T are interleaved, and `in` is padded to a multiple of 2, or 32 with AMX.
//
//     embed(tokens (N,), positions (N,), token_table (V, C), position_table (P, C)) -> x (N, C)
//     pack_weight(weight (out, in)) -> packed
//     pack_weight_out(weight (out, in), packed): writes packed, of packed_shape(weight)
//     linear(x (N, in), packed, out_features, bias (out,) float32, residual (N, out), activation)
//         -> y (N, out)
//     linear_float32_out(x (N, in) bfloat16, packed, y (N, out) float32): writes y
//     has_bfloat16() -> whether pack_weight and linear take bfloat16 (AVX512_BF16)
//     layer_norm(x (N, C), weight (C,), bias (C,), epsilon) -> y (N, C)
//     paged_attention(qkv (R, 3, H, D), cache, block_table, seq_indices, positions, scale)
//         -> out (R, H D); rows from N on are 0
//     qkv_paged_attention(x (R, C), packed, bias, cache, ...): paged_attention of
//         linear(x, packed, bias), with columns in the order (H, 3, D)
//         cache        (H, n_blocks, block_elements): float as in kv_blocks_full.h, or uint8 as in
//                      kv_blocks_int8.h
//         block_table  (sequences, blocks per sequence) int32
//         seq_indices  (N,) int64: the row of block_table of each token
//         positions    (N,) int64: all earlier positions are in the cache or in this call
//     sample(logits (S, V), seeds, steps, temperatures, kept_sizes, kept_ranges, top_ps,
//            margin_bounds)
//         -> (tokens, margins)
//         seeds, steps   (S,) int64
//         temperatures   (S,) float64
//         kept_sizes     (S,) int64, 1 to V: how many tokens can win, ties aside
//         kept_ranges    (S,) float64: how far below the largest logit a token can win
//         top_ps         (S,) float64: the share of the mass that can win; 1 keeps all
//         margin_bounds  (S,) float64: a margin above the bound may be returned as the bound
//         tokens         (S,) int64; -1 if logits hold NaN or +inf, or only -inf
//         margins        (S,) float64
//     total_masses(logits (S, V)) -> (totals (S,) int64, max_logits (S,) float32)
//         totals      the mass of all tokens (pipeline/engine/nucleus.py) at temperature 1; 0 if
//                     logits hold NaN or +inf, or only -inf
//     rescore(logits (S, V), hidden (S, C), weight (V, C), row_factors (S, 2),
//             group_norms (G, 2), kept_sizes (S,), exact_ranges (S,))
//         -> thresholds (S,); changes logits
//         logits, hidden and weight are float32, kept_sizes is int64, the others float64. An
//         approximate logit of row s and group g (32 tokens) is off by at most
//         row_factors[s] . group_norms[g]

#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "kernels.h"
#include "ops.h"

namespace gptbatch {
namespace {

using at::Tensor;

// at::empty for the CPU, whose header takes 1.4 s more to compile.
Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return Tensor(at::detail::empty_cpu(sizes, dtype));
}

Activation parse_activation(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  TORCH_CHECK(name == "tanh", "linear: unknown activation ", name);
  return Activation::tanh;
}

// The elements of a tensor of dtype T.
template <class T>
const T* elements(const Tensor& x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return reinterpret_cast<const T*>(x.const_data_ptr<at::BFloat16>());
  else
    return x.const_data_ptr<T>();
}

template <class T>
T* mutable_elements(Tensor& x) {
  return const_cast<T*>(elements<T>(x));
}

bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || (HAS_BFLOAT16 && dtype == at::kBFloat16);
}

// x, contiguous, and padded with 0 to the in_features of a packed weight.
Tensor prepare_input(const Tensor& x, const Tensor& packed, int64_t out_features) {
  TORCH_CHECK(x.dim() == 2 && packed.dim() == 3, "linear: x must have 2 dimensions, packed 3; got ",
              x.sizes(), " and ", packed.sizes());
  TORCH_CHECK(x.scalar_type() == packed.scalar_type() && is_supported(x.scalar_type()),
              "linear: x and packed must have one supported dtype; got ", x.scalar_type(), " and ",
              packed.scalar_type());
  TORCH_CHECK(packed.size(1) > 0, "linear: x has no columns");
  const int64_t padding = packed.size(1) - x.size(1);
  const int64_t max_padding = x.scalar_type() == at::kFloat ? 0 : bfloat16_k_multiple() - 1;
  const int64_t panels = (out_features + panel_columns() - 1) / panel_columns();
  TORCH_CHECK(padding >= 0 && padding <= max_padding && packed.size(2) == panel_columns() &&
                  packed.size(0) == panels,
              "linear: the shapes of x ", x.sizes(), " and packed ", packed.sizes(),
              " do not fit out_features ", out_features);
  if (padding == 0) return x.contiguous();
  Tensor padded = x.new_zeros({x.size(0), packed.size(1)});
  padded.narrow(1, 0, x.size(1)).copy_(x);
  return padded;
}

void check_indices(const char* name, const Tensor& indices, int64_t rows) {
  TORCH_CHECK(indices.dim() == 1 && indices.is_contiguous() && indices.scalar_type() == at::kLong,
              "embed: ", name, " must be a contiguous vector of int64");
  const int64_t* index = indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < indices.numel(); i++)
    TORCH_CHECK(index[i] >= 0 && index[i] < rows, "embed: ", name, " holds ", index[i],
                "; the table has ", rows, " rows");
}

Tensor embed_op(const Tensor& tokens, const Tensor& positions, const Tensor& token_table,
                const Tensor& position_table) {
  TORCH_CHECK(token_table.dim() == 2 && position_table.dim() == 2 &&
                  token_table.is_contiguous() && position_table.is_contiguous() &&
                  token_table.size(1) == position_table.size(1) &&
                  token_table.scalar_type() == position_table.scalar_type() &&
                  (token_table.scalar_type() == at::kFloat ||
                   token_table.scalar_type() == at::kBFloat16),
              "embed: the tables must be contiguous, of one width and of float32 or bfloat16");
  check_indices("tokens", tokens, token_table.size(0));
  check_indices("positions", positions, position_table.size(0));
  TORCH_CHECK(tokens.numel() == positions.numel(), "embed: one position per token is needed");
  const int64_t count = tokens.numel(), width = token_table.size(1);
  Tensor x = empty({count, width}, token_table.scalar_type());
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  if (token_table.scalar_type() == at::kFloat) {
    embed(token, position, count, width, elements<float>(token_table),
          elements<float>(position_table), mutable_elements<float>(x));
  } else {
    embed(token, position, count, width, elements<BFloat16>(token_table),
          elements<BFloat16>(position_table), mutable_elements<BFloat16>(x));
  }
  return x;
}

std::vector<int64_t> packed_shape(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(),
              "pack_weight: weight must be a contiguous matrix; got ", weight.sizes());
  TORCH_CHECK(is_supported(weight.scalar_type()), "pack_weight: dtype ", weight.scalar_type(),
              " is not supported by this CPU");
  const bool is_float = weight.scalar_type() == at::kFloat;
  const int64_t out = weight.size(0), in = weight.size(1), columns = panel_columns();
  const int64_t multiple = is_float ? 1 : bfloat16_k_multiple();
  const int64_t in_padded = (in + multiple - 1) / multiple * multiple;
  return {(out + columns - 1) / columns, in_padded, columns};
}

void pack_weight_out(const Tensor& weight, Tensor& packed) {
  const std::vector<int64_t> shape = packed_shape(weight);
  TORCH_CHECK(packed.sizes() == shape && packed.is_contiguous() &&
                  packed.scalar_type() == weight.scalar_type(),
              "pack_weight_out: packed must be contiguous, of shape ", shape, "; got ",
              packed.sizes());
  packed.zero_();
  const int64_t out = weight.size(0), in = weight.size(1), in_padded = shape[1];
  if (weight.scalar_type() == at::kFloat) {
    pack_weight(weight.const_data_ptr<float>(), out, in, in_padded, packed.data_ptr<float>());
  } else {
#ifdef __AVX512BF16__
    pack_weight(elements<BFloat16>(weight), out, in, in_padded, mutable_elements<BFloat16>(packed));
#endif
  }
}

Tensor pack_weight_op(const Tensor& weight) {
  Tensor packed = weight.new_empty(packed_shape(weight));
  pack_weight_out(weight, packed);
  return packed;
}

template <class T>
void call_linear(const Tensor& x, const Tensor& packed, const float* bias, const Tensor& residual,
                 Activation activation, Tensor& y) {
  const T* added = residual.defined() ? elements<T>(residual) : nullptr;
  linear(elements<T>(x), x.size(0), x.size(1), elements<T>(packed), y.size(1), bias,
         added, activation, mutable_elements<T>(y));
}

}  // namespace

Tensor linear_op(const Tensor& x, const Tensor& packed, int64_t out_features,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                 std::string activation) {
  const Tensor input = prepare_input(x, packed, out_features);
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() &&
                        bias->numel() == out_features),
              "linear: bias must be contiguous float32 of ", out_features, " elements");
  Tensor y = empty({x.size(0), out_features}, x.scalar_type());
  const Tensor added = residual ? residual->contiguous() : Tensor();
  TORCH_CHECK(!residual || (added.sizes() == y.sizes() && added.scalar_type() == y.scalar_type()),
              "linear: residual must have the shape ", y.sizes(), " and dtype of the output");
  if (x.size(0) == 0) return y;
  const float* bias_values = bias ? bias->const_data_ptr<float>() : nullptr;
  const Activation parsed = parse_activation(activation);
  if (x.scalar_type() == at::kFloat) {
    call_linear<float>(input, packed, bias_values, added, parsed, y);
  } else {
#ifdef __AVX512BF16__
    call_linear<BFloat16>(input, packed, bias_values, added, parsed, y);
#endif
  }
  return y;
}

namespace {

void linear_float32_out_op(const Tensor& x, const Tensor& packed, Tensor& y) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && y.scalar_type() == at::kFloat &&
                  y.is_contiguous() && y.size(0) == x.size(0),
              "linear_float32_out: x must be bfloat16, y contiguous float32 with as many rows");
  const Tensor input = prepare_input(x, packed, y.size(1));
#ifdef __AVX512BF16__
  if (x.size(0) > 0)
    linear<BFloat16, float>(elements<BFloat16>(input), input.size(0), input.size(1),
                            elements<BFloat16>(packed), y.size(1), nullptr, nullptr,
                            Activation::none, y.data_ptr<float>());
#endif
}

bool has_bfloat16() { return HAS_BFLOAT16; }

template <class T>
void call_layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon,
                     Tensor& y) {
  layer_norm(elements<T>(x), x.size(0), x.size(1), elements<T>(weight),
             elements<T>(bias), epsilon, mutable_elements<T>(y));
}

}  // namespace

Tensor layer_norm_op(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && weight.is_contiguous() &&
                  bias.is_contiguous() && weight.numel() == x.size(1) &&
                  bias.numel() == x.size(1) && weight.scalar_type() == x.scalar_type() &&
                  bias.scalar_type() == x.scalar_type(),
              "layer_norm: the shapes or dtypes of x ", x.sizes(), ", weight ", weight.sizes(),
              " and bias ", bias.sizes(), " do not fit");
  Tensor y = empty(x.sizes(), x.scalar_type());
  if (x.scalar_type() == at::kFloat) {
    call_layer_norm<float>(x, weight, bias, epsilon, y);
  } else {
    call_layer_norm<BFloat16>(x, weight, bias, epsilon, y);
  }
  return y;
}

namespace {

// Checks the cache and the tokens of a call on x, which has `rows` rows and this dtype.
PagedTokens paged_tokens(const Tensor& x, Tensor& cache, const Tensor& block_table,
                         const Tensor& seq_indices, const Tensor& positions, double scale,
                         int64_t head_size) {
  const bool is_int8 = cache.scalar_type() == at::kByte;
  TORCH_CHECK(cache.dim() == 3 && cache.is_contiguous() && block_table.is_contiguous() &&
                  seq_indices.is_contiguous() && positions.is_contiguous(),
              "paged_attention: cache, block_table, seq_indices and positions must be contiguous");
  TORCH_CHECK(seq_indices.sizes() == positions.sizes() && seq_indices.size(0) <= x.size(0),
              "paged_attention: seq_indices ", seq_indices.sizes(), " and positions ",
              positions.sizes(), " must have one shape, of at most ", x.size(0), " tokens");
  TORCH_CHECK(is_int8 || cache.scalar_type() == x.scalar_type(),
              "paged_attention: the cache must be uint8 or have the dtype of qkv; got ",
              cache.scalar_type(), " and ", x.scalar_type());
  TORCH_CHECK(cache.size(2) == kv_block_elements(is_int8, head_size),
              "paged_attention: a block of the cache has ", cache.size(2), " elements, not ",
              kv_block_elements(is_int8, head_size));
  return {seq_indices.size(0),
          cache.size(0),
          head_size,
          seq_indices.const_data_ptr<int64_t>(),
          positions.const_data_ptr<int64_t>(),
          block_table.const_data_ptr<int32_t>(),
          block_table.size(1),
          cache.data_ptr(),
          cache.size(1),
          is_int8,
          static_cast<float>(scale)};
}

// An output of which the kernel writes the first n_tokens rows; the others are 0.
Tensor empty_output(const Tensor& x, int64_t n_tokens, int64_t columns) {
  Tensor out = empty({x.size(0), columns}, x.scalar_type());
  const size_t row_bytes = static_cast<size_t>(columns) * out.element_size();
  std::memset(static_cast<char*>(out.data_ptr()) + static_cast<size_t>(n_tokens) * row_bytes, 0,
              static_cast<size_t>(x.size(0) - n_tokens) * row_bytes);
  return out;
}

template <class T>
void call_paged_attention(const Tensor& qkv, const PagedTokens& tokens, Tensor& out) {
  paged_attention(elements<T>(qkv), qkv.stride(0), qkv.stride(1), qkv.stride(2), tokens,
                  mutable_elements<T>(out));
}

}  // namespace

Tensor paged_attention_op(const Tensor& qkv, Tensor cache, const Tensor& block_table,
                          const Tensor& seq_indices, const Tensor& positions, double scale) {
  TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3 && qkv.size(2) == cache.size(0) &&
                  qkv.stride(3) == 1,
              "paged_attention: qkv must be (R, 3, H, D) with contiguous D; got ", qkv.sizes());
  const PagedTokens tokens =
      paged_tokens(qkv, cache, block_table, seq_indices, positions, scale, qkv.size(3));
  Tensor out = empty_output(qkv, tokens.n_tokens, qkv.size(2) * qkv.size(3));
  if (qkv.scalar_type() == at::kFloat) {
    call_paged_attention<float>(qkv, tokens, out);
  } else {
    call_paged_attention<BFloat16>(qkv, tokens, out);
  }
  return out;
}

namespace {

template <class T>
void call_qkv_paged_attention(const Tensor& x, const Tensor& packed, const Tensor& bias,
                              const PagedTokens& tokens, Tensor& out) {
  qkv_paged_attention(elements<T>(x), x.size(1), elements<T>(packed), packed.size(0),
                      bias.const_data_ptr<float>(), tokens, mutable_elements<T>(out));
}

}  // namespace

Tensor qkv_paged_attention_op(const Tensor& x, const Tensor& packed, const Tensor& bias,
                              Tensor cache, const Tensor& block_table, const Tensor& seq_indices,
                              const Tensor& positions, double scale) {
  const int64_t columns = bias.numel(), heads = cache.size(0);
  TORCH_CHECK(bias.scalar_type() == at::kFloat && bias.is_contiguous(),
              "qkv_paged_attention: bias must be contiguous float32");
  TORCH_CHECK(heads > 0 && columns % (heads * panel_columns()) == 0,
              "qkv_paged_attention: the columns of a head must fill whole panels of ",
              panel_columns(), "; got ", columns, " columns for ", heads, " heads");
  const Tensor input = prepare_input(x, packed, columns);
  const PagedTokens tokens = paged_tokens(x, cache, block_table, seq_indices, positions, scale,
                                          columns / 3 / heads);
  Tensor out = empty_output(x, tokens.n_tokens, columns / 3);
  if (x.scalar_type() == at::kFloat) {
    call_qkv_paged_attention<float>(input, packed, bias, tokens, out);
  } else {
#ifdef __AVX512BF16__
    call_qkv_paged_attention<BFloat16>(input, packed, bias, tokens, out);
#endif
  }
  return out;
}

namespace {

std::tuple<Tensor, Tensor> sample_op(const Tensor& logits, const Tensor& seeds,
                                     const Tensor& steps, const Tensor& temperatures,
                                     const Tensor& kept_sizes, const Tensor& kept_ranges,
                                     const Tensor& top_ps, const Tensor& margin_bounds) {
  const int64_t batch = logits.size(0), vocab_size = logits.size(1);
  TORCH_CHECK(logits.is_contiguous() && seeds.numel() == batch && steps.numel() == batch &&
                  temperatures.numel() == batch && kept_sizes.numel() == batch &&
                  kept_ranges.numel() == batch && top_ps.numel() == batch && margin_bounds.numel() == batch,
              "sample: logits must be contiguous, and the other inputs must have ", batch,
              " elements each");
  Tensor tokens = empty({batch}, seeds.scalar_type());
  Tensor margins = empty({batch}, temperatures.scalar_type());
  const SampleRows rows{seeds.const_data_ptr<int64_t>(), steps.const_data_ptr<int64_t>(),
                        temperatures.const_data_ptr<double>(), kept_sizes.const_data_ptr<int64_t>(),
                        kept_ranges.const_data_ptr<double>(), top_ps.const_data_ptr<double>(),
                        margin_bounds.const_data_ptr<double>()};
  int64_t* token = tokens.data_ptr<int64_t>();
  double* margin = margins.data_ptr<double>();
  if (logits.scalar_type() == at::kFloat) {
    sample(logits.const_data_ptr<float>(), batch, vocab_size, rows, token, margin);
  } else {
    sample(elements<BFloat16>(logits), batch, vocab_size, rows, token, margin);
  }
  return {tokens, margins};
}

std::tuple<Tensor, Tensor> total_masses_op(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0 &&
                  (logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16),
              "total_masses: logits must be a contiguous matrix of float32 or bfloat16; got ",
              logits.sizes(), " of ", logits.scalar_type());
  const int64_t batch = logits.size(0), vocab_size = logits.size(1);
  Tensor totals = empty({batch}, at::kLong);
  Tensor max_logits = empty({batch}, at::kFloat);
  int64_t* total = totals.data_ptr<int64_t>();
  float* max = max_logits.data_ptr<float>();
  if (logits.scalar_type() == at::kFloat) {
    total_masses(logits.const_data_ptr<float>(), batch, vocab_size, total, max);
  } else {
    total_masses(elements<BFloat16>(logits), batch, vocab_size, total, max);
  }
  return {totals, max_logits};
}

Tensor rescore_op(Tensor& logits, const Tensor& hidden, const Tensor& weight,
                  const Tensor& row_factors, const Tensor& group_norms,
                  const Tensor& kept_sizes, const Tensor& exact_ranges) {
  const int64_t batch = logits.size(0), vocab_size = logits.size(1), width = hidden.size(1);
  const int64_t groups = (vocab_size + TOKENS_PER_GROUP - 1) / TOKENS_PER_GROUP;
  TORCH_CHECK(logits.is_contiguous() && hidden.is_contiguous() && weight.is_contiguous() &&
                  row_factors.is_contiguous() && group_norms.is_contiguous(),
              "rescore: all inputs must be contiguous");
  TORCH_CHECK(hidden.size(0) == batch && weight.size(0) == vocab_size && weight.size(1) == width &&
                  row_factors.numel() == 2 * batch &&
                  group_norms.numel() == 2 * groups &&
                  kept_sizes.numel() == batch && exact_ranges.numel() == batch,
              "rescore: the shapes of logits ", logits.sizes(), ", hidden ", hidden.sizes(),
              ", weight ", weight.sizes(), ", row_factors ", row_factors.sizes(),
              " and group_norms ", group_norms.sizes(), " do not fit");
  Tensor thresholds = empty({batch}, exact_ranges.scalar_type());
  const RescoreInputs inputs{hidden.const_data_ptr<float>(),
                             weight.const_data_ptr<float>(),
                             batch,
                             vocab_size,
                             width,
                             row_factors.const_data_ptr<double>(),
                             group_norms.const_data_ptr<double>(),
                             kept_sizes.const_data_ptr<int64_t>(),
                             exact_ranges.const_data_ptr<double>()};
  rescore(logits.data_ptr<float>(), inputs, thresholds.data_ptr<double>());
  return thresholds;
}

}  // namespace
}  // namespace gptbatch

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def(
      "embed(Tensor tokens, Tensor positions, Tensor token_table, Tensor position_table) -> Tensor");
  library.def("packed_shape(Tensor weight) -> int[]");
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def("pack_weight_out(Tensor weight, Tensor(a!) packed) -> ()");
  library.def(
      "linear(Tensor x, Tensor packed, int out_features, Tensor? bias, Tensor? residual, "
      "str activation) -> Tensor");
  library.def("linear_float32_out(Tensor x, Tensor packed, Tensor(a!) y) -> ()");
  library.def("has_bfloat16() -> bool", gptbatch::has_bfloat16);
  library.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon) -> Tensor");
  library.def(
      "paged_attention(Tensor qkv, Tensor(a!) cache, Tensor block_table, Tensor seq_indices, "
      "Tensor positions, float scale) -> Tensor");
  library.def(
      "qkv_paged_attention(Tensor x, Tensor packed, Tensor bias, Tensor(a!) cache, "
      "Tensor block_table, Tensor seq_indices, Tensor positions, float scale) -> Tensor");
  library.def(
      "sample(Tensor logits, Tensor seeds, Tensor steps, Tensor temperatures, Tensor kept_sizes, "
      "Tensor kept_ranges, Tensor top_ps, Tensor margin_bounds) -> (Tensor, Tensor)");
  library.def("total_masses(Tensor logits) -> (Tensor, Tensor)");
  library.def(
      "rescore(Tensor(a!) logits, Tensor hidden, Tensor weight, Tensor row_factors, "
      "Tensor group_norms, Tensor kept_sizes, Tensor exact_ranges) -> Tensor");
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) {
  library.impl("embed", gptbatch::embed_op);
  library.impl("packed_shape", gptbatch::packed_shape);
  library.impl("pack_weight", gptbatch::pack_weight_op);
  library.impl("pack_weight_out", gptbatch::pack_weight_out);
  library.impl("linear", gptbatch::linear_op);
  library.impl("linear_float32_out", gptbatch::linear_float32_out_op);
  library.impl("layer_norm", gptbatch::layer_norm_op);
  library.impl("paged_attention", gptbatch::paged_attention_op);
  library.impl("qkv_paged_attention", gptbatch::qkv_paged_attention_op);
  library.impl("sample", gptbatch::sample_op);
  library.impl("total_masses", gptbatch::total_masses_op);
  library.impl("rescore", gptbatch::rescore_op);
}
