// Interfaces of the kernels: raw pointers to contiguous memory. ops.cpp checks the tensors first.
//
// The kernels include no header of torch: its headers take seconds to compile.

#pragma once

#include <cstdint>

#include "bfloat16.h"

namespace gptbatch {

// Data layouts that Python uses, too: pipeline/kernels/constants.py, passed by the build.
constexpr int64_t FULL_BLOCK_SIZE = GPTBATCH_FULL_BLOCK_SIZE;
constexpr int64_t INT8_BLOCK_SIZE = GPTBATCH_INT8_BLOCK_SIZE;
constexpr int64_t HEAD_SIZE_MULTIPLE = GPTBATCH_HEAD_SIZE_MULTIPLE;
constexpr int64_t INT8_SCALE_BYTES = GPTBATCH_INT8_SCALE_BYTES;
constexpr int32_t INT8_MAX_VALUE = GPTBATCH_INT8_MAX;
constexpr float INT8_MIN_ABSMAX = static_cast<float>(GPTBATCH_INT8_MIN_ABSMAX);
constexpr int64_t TOKENS_PER_GROUP = GPTBATCH_TOKENS_PER_GROUP;
constexpr int64_t CACHE_LINE_BYTES = GPTBATCH_CACHE_LINE_BYTES;

#ifdef __AVX512BF16__
constexpr bool HAS_BFLOAT16 = true;
#else
constexpr bool HAS_BFLOAT16 = false;
#endif

enum class Activation { none, gelu_tanh, gelu, relu, silu, tanh };

// embedding.cpp

// x (count, width) = token_table[tokens] + position_table[positions]
template <class T>
void embed(const int64_t* tokens, const int64_t* positions, int64_t count, int64_t width,
           const T* token_table, const T* position_table, T* x);

// linear.cpp

// NR: output features per packed panel.
int64_t panel_columns();
// in_features of a packed bfloat16 weight are padded to a multiple of this.
int64_t bfloat16_k_multiple();

// packed (panels, in_padded, NR), filled with 0 before the call <- weight (out, in).
template <class T>
void pack_weight(const T* weight, int64_t out, int64_t in, int64_t in_padded, T* packed);

// y (rows, out) = activation(x (rows, in) W^T + bias) + residual; bias and residual may be null.
template <class T, class Y>
void linear(const T* x, int64_t rows, int64_t in, const T* packed, int64_t out, const float* bias,
            const Y* residual, Activation activation, Y* y);

// layer_norm.cpp

template <class T>
void layer_norm(const T* x, int64_t rows, int64_t width, const T* weight, const T* bias,
                double epsilon, T* y);

// attention.cpp

// One layer's cache (H, n_blocks, block_elements), and the tokens of a call.
struct PagedTokens {
  int64_t n_tokens, n_heads, head_size;
  const int64_t* seq_indices;  // (n_tokens,)
  const int64_t* positions;    // (n_tokens,)
  const int32_t* block_table;  // (sequences, blocks_per_seq)
  int64_t blocks_per_seq;
  void* cache;
  int64_t n_blocks;
  bool is_int8;  // the cache's dtype: uint8, or that of the queries
  float scale;
};

// Elements of the cache's dtype in one block of one head.
int64_t kv_block_elements(bool is_int8, int64_t head_size);

// qkv: element d of part p (query, key, value) of head h of token t is at
// qkv[t * token_stride + p * part_stride + h * head_stride + d]. out (n_tokens, H D).
template <class T>
void paged_attention(const T* qkv, int64_t token_stride, int64_t part_stride, int64_t head_stride,
                     const PagedTokens& tokens, T* out);

// x (n_tokens, in); packed has n_panels panels with columns in the order (H, 3, D).
template <class T>
void qkv_paged_attention(const T* x, int64_t in, const T* packed, int64_t n_panels,
                         const float* bias, const PagedTokens& tokens, T* out);

// sample.cpp: each array has one element per row of logits; ops.cpp describes them.

struct SampleRows {
  const int64_t *seeds, *steps;
  const double* temperatures;
  const int64_t* kept_sizes;
  const double *kept_ranges, *top_ps, *margin_bounds;
};

template <class T>
void sample(const T* logits, int64_t n_rows, int64_t vocab_size, const SampleRows& rows,
            int64_t* tokens, double* margins);

// total_masses.cpp: per row, the mass of all tokens at temperature 1, and the largest logit.

template <class T>
void total_masses(const T* logits, int64_t n_rows, int64_t vocab_size, int64_t* totals,
                  float* max_logits);

// rescore.cpp

struct RescoreInputs {
  const float *hidden, *weight;
  int64_t n_rows, vocab_size, width;
  const double *row_factors, *group_norms;
  const int64_t* kept_sizes;
  const double* exact_ranges;
};

void rescore(float* logits, const RescoreInputs& inputs, double* thresholds);

}  // namespace gptbatch
