// int8 KV blocks, and the attention of queries over them, one block after the other.
//
// A block holds 64 positions of one head. P, padded_size_ in the code, is the head size D padded to
// a multiple of 32 with 0.
// An int8 is stored as a byte plus 128:
//
//     keys          (P / 4, 64, 4)  four elements of a position side by side
//     key scales    (64,)           float32: key = int8 * scale
//     values        (16, P, 4)      one element of four positions side by side
//     value scales  (64,)
//
// Quantization is symmetric, per token and head: scale = absmax / 127, int8 = round(x / scale),
// ties to even. Queries, and weights times value scales, are quantized in the same way to 16-bit
// integers of up to INT16_MAX_VALUE. Integer sums are exact in any order. The float32 results of a
// block are joined by online softmax (Milakov and Gimelshein 2018). Naive code that computes the
// same:
//
//     for (block = 0; block < n_blocks; block++) {
//       for (k = 0; k < 64; k++)
//         score[k] = scale * query_scale * key_scale[k] * dot(query_int, key_int[k]);
//       new_max = max(max, max(score)); decay = exp(max - new_max);
//       for (k = 0; k < 64; k++) weight[k] = exp(score[k] - new_max);
//       total = total * decay + sum(weight);
//       (w_int, w_scale) = quantize(weight * value_scale);
//       for (d = 0; d < D; d++)
//         out[d] = fma(dot(w_int, value_int[.][d]), w_scale, out[d] * decay);
//       max = new_max;
//     }
//     out *= 1 / total;  // in attention_tiles.h
//
// The sum of weights has 32 lanes, by position modulo 32, and then a fixed tree (LogicalLanes).

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "attention_scratch.h"
#include "functions.h"
#include "int8_dot.h"
#include "prefetch.h"

namespace gptbatch {

// Quantizes `count` elements to integers of up to `max`, in float32, padded with 0 to a multiple of
// LANES. Returns the scale; NaN if an element is NaN or infinite.
template <class T>
inline float quantize(const T* from, int64_t count, int32_t max, float* to) {
  Vec lane_max{};
  for (int64_t d = 0; d < count; d += LANES) {
    const Vec x = load(from + d, count - d);
    store(to + d, x);
    lane_max = maximum(lane_max, absolute(x));
  }
  const float absmax = max_lanes(lane_max);
  // 0 where absmax is finite, else NaN. Added to the scale, it passes NaN on.
  const float zero_or_nan = absmax - absmax;
  const bool is_valid = absmax >= INT8_MIN_ABSMAX && zero_or_nan == 0.0f;
  const float factor = is_valid ? static_cast<float>(max) / absmax : 0.0f;
  for (int64_t d = 0; d < count; d += LANES)
    store(to + d, round_to_integer(load(to + d) * factor));
  return absmax / static_cast<float>(max) + zero_or_nan;
}

// One head of the cache, through the block table of one sequence. The part that is the same for
// every dtype of the model.
class Int8BlocksBase {
 public:
  using Element = uint8_t;
  static constexpr int64_t SIZE = INT8_BLOCK_SIZE;

  static int64_t block_elements(int64_t padded_size) {
    return 2 * SIZE * (padded_size + INT8_SCALE_BYTES);
  }

  // Appends the half blocks of a sequence in reading order: each block's keys and values.
  static void append_reading_order(const int32_t* blocks, int64_t count,
                                   std::vector<int32_t>& halves) {
    for (int64_t i = 0; i < count; i++)
      halves.push_back(2 * blocks[i]), halves.push_back(2 * blocks[i] + 1);
  }

 protected:
  static_assert(INT8_SCALE_BYTES == sizeof(float));
  static constexpr int VECTORS = SIZE / LANES;  // with one lane per position of a block

  Int8BlocksBase(int64_t padded_size, const int32_t* block_table, Element* cache)
      : padded_size_(padded_size), block_table_(block_table), cache_(cache) {}

  template <int Q>
  struct Queries {
    SplitInt16 int16s[Q];
    int32_t sums[Q];
    float scales[Q];
  };

  // Per query: the largest score so far, and the sum of exp(score - max).
  template <int Q>
  struct OnlineSoftmax {
    float max[Q], total[Q];
    OnlineSoftmax() {
      std::fill(max, max + Q, -std::numeric_limits<float>::infinity());
      std::fill(total, total + Q, 0.0f);
    }
  };

  // The quantized weights of one block, and the decay of what earlier blocks summed.
  template <int Q>
  struct Weights {
    int32_t first[Q][SIZE / 4], second[Q][SIZE / 4], sums[Q];
    float scales[Q], decay[Q];
  };

  static uint8_t to_byte(float whole) { return static_cast<uint8_t>(to_int(whole) + 128); }

  uint8_t* keys(int64_t i) const { return cache_ + block_table_[i] * block_elements(padded_size_); }
  uint8_t* values(int64_t i) const { return keys(i) + SIZE * (padded_size_ + INT8_SCALE_BYTES); }
  float* key_scales(int64_t i) const {
    return reinterpret_cast<float*>(keys(i) + SIZE * padded_size_);
  }
  float* value_scales(int64_t i) const {
    return reinterpret_cast<float*>(values(i) + SIZE * padded_size_);
  }

  // Query q sees count + q positions of the block, where that is above 0.
  template <int Q>
  void add_block(int64_t block, const Queries<Q>& queries, int64_t count,
                 BlockPrefetcher& prefetcher, OnlineSoftmax<Q>& softmax, float* out) const {
    // A few lines at a time: a CPU drops prefetches that exceed its fill buffers. The softmax takes
    // the longest, and gets half of them.
    const int64_t prefetches = 2 * prefetcher.rate(), eighth = prefetches / 8;
    const int64_t per_vector = prefetches / 2 / (Q * VECTORS);
    float scores[Q][SIZE];
    prefetcher.prefetch(eighth);
    score<Q>(block, queries, scores);
    prefetcher.prefetch(eighth);
    Weights<Q> weights;
    for (int i = 0; i < Q; i++) {
      const int64_t seen = std::min(SIZE, count + i);
      update_softmax<Q>(scores[i], value_scales(block), seen, i, prefetcher, per_vector, softmax,
                        weights);
    }
    prefetcher.prefetch(eighth);
    weigh_values<Q>(block, weights, (std::min(SIZE, count + Q - 1) + 3) / 4, out);
    prefetcher.prefetch(prefetches - 3 * eighth - Q * VECTORS * per_vector);
  }

  // Micro-kernel: scores of one block.
  //
  // Register map:
  //
  //     dots[q][n]     query q, LANES positions: Q * N accumulators (with VNNI two registers each)
  //     bytes[n]       four elements of LANES positions: N registers
  //     first, second  the same four elements of a query in all lanes
  template <int Q>
  FLAT void score(int64_t block, const Queries<Q>& queries, float (*scores)[SIZE]) const {
    constexpr int N = std::min(VECTORS, Q == 1 ? 4 : 2);
    for (int64_t v = 0; v < VECTORS; v += N) {
      const uint8_t* from = keys(block) + v * LANES * 4;
      Int8Dot dots[Q][N];
      unroll<Q>([&](auto q) { unroll<N>([&](auto n) { dots[q][n] = Int8Dot{}; }); });
      for (int64_t j = 0; j < padded_size_ / 4; j++, from += SIZE * 4) {
        Uint32Vec bytes[N];
        unroll<N>([&](auto n) { bytes[n] = load_uint32(from + n * LANES * 4); });
        unroll<Q>([&](auto q) {
          const SplitInt16& int16s = queries.int16s[q];
          const Uint32Vec first = broadcast_uint32(int16s.first[j]);
          const Uint32Vec second = broadcast_uint32(int16s.second[j]);
          unroll<N>([&](auto n) { dots[q][n].add(bytes[n], first, second); });
        });
      }
      unroll<N>([&](auto n) {
        const Vec scale = load(key_scales(block) + (v + n) * LANES);
        unroll<Q>([&](auto q) {
          store(scores[q] + (v + n) * LANES,
                dots[q][n].total(queries.sums[q]) * (scale * queries.scales[q]));
        });
      });
    }
  }

  // One step of online softmax for query i, which sees the first `count` positions; the others may
  // hold anything, scales included. Prefetches `per_vector` lines per vector.
  template <int Q>
  static void update_softmax(const float* scores, const float* scales, int64_t count, int i,
                             BlockPrefetcher& prefetcher, int64_t per_vector,
                             OnlineSoftmax<Q>& softmax, Weights<Q>& weights) {
    const SplitInt16 int16s{weights.first[i], weights.second[i]};
    if (count <= 0) {
      std::fill(weights.first[i], weights.first[i] + SIZE / 4, 0);
      std::fill(weights.second[i], weights.second[i] + SIZE / 4, 0);
      weights.sums[i] = 0, weights.scales[i] = 0.0f, weights.decay[i] = 1.0f;
      return;
    }
    constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
    Vec own[VECTORS], scale[VECTORS], lane_max = broadcast(MINUS_INFINITY);
    for (int v = 0; v < VECTORS; v++) {
      const int64_t here = count - v * LANES;
      own[v] = load(scores + v * LANES), scale[v] = load(scales + v * LANES);
      if (here < LANES) {
        own[v] = first_lanes(own[v], here, MINUS_INFINITY);
        scale[v] = first_lanes(scale[v], here, 0.0f);
      }
      lane_max = maximum(lane_max, own[v]);
    }
    const float new_max = std::max(max_lanes(lane_max), softmax.max[i]);
    // 0 where new_max is finite, else NaN: as the first summand, it makes the row's total NaN.
    const float zero_or_nan = new_max - new_max;
    LogicalLanes total;
    total.lanes[0] = broadcast(zero_or_nan);
    Vec max_product{}, sum{};
    UNROLL
    for (int v = 0; v < VECTORS; v++) {
      prefetcher.prefetch(per_vector);
      const Vec weight = exp_up_to_limit(own[v] - new_max);
      Vec& lanes = total.lanes[v % LogicalLanes::VECTORS];
      lanes = lanes + weight;
      own[v] = weight * scale[v];
      max_product = maximum(max_product, own[v]);
    }
    const float absmax = max_lanes(max_product);
    const float factor = absmax >= INT8_MIN_ABSMAX ? INT16_MAX_VALUE / absmax : 0.0f;
    for (int v = 0; v < VECTORS; v++) {
      const Vec whole = round_to_integer(own[v] * factor);
      sum = sum + whole;
      int16s.put(v * LANES, whole);
    }
    const float decay = exp_up_to_limit(softmax.max[i] - new_max);
    softmax.max[i] = new_max;
    softmax.total[i] = softmax.total[i] * decay + total.total();
    weights.sums[i] = to_int(sum_lanes(sum));
    weights.scales[i] = absmax / INT16_MAX_VALUE;
    weights.decay[i] = decay;
  }

  template <int Q>
  void weigh_values(int64_t block, const Weights<Q>& weights, int64_t n_groups, float* out) const {
    constexpr int N = 32 / LANES;
    int64_t d = 0;
    if constexpr (Q == 1)
      for (; d + 2 * N * LANES <= padded_size_; d += 2 * N * LANES)
        weigh_columns<Q, 2 * N>(block, weights, n_groups, d, out);
    for (; d < padded_size_; d += N * LANES)
      weigh_columns<Q, N>(block, weights, n_groups, d, out);
  }

  // Micro-kernel: adds one block's weighted values to N vectors of out, from column d0 on.
  //
  // Register map:
  //
  //     dots[q][n]     query q, LANES columns: Q * N accumulators (4, 8 or 16). With AVX2 and four
  //                    queries they are 16 of 16 registers, so GCC spills some
  //     bytes[n]       LANES columns of four positions: N registers
  //     first, second  the weights of the same four positions in all lanes
  template <int Q, int N>
  FLAT void weigh_columns(int64_t block, const Weights<Q>& weights, int64_t n_groups, int64_t d0,
                          float* out) const {
    Int8Dot dots[Q][N];
    unroll<Q>([&](auto q) { unroll<N>([&](auto n) { dots[q][n] = Int8Dot{}; }); });
    const uint8_t* from = values(block) + d0 * 4;
    for (int64_t j = 0; j < n_groups; j++, from += padded_size_ * 4) {
      Uint32Vec bytes[N];
      unroll<N>([&](auto n) { bytes[n] = load_uint32(from + n * LANES * 4); });
      unroll<Q>([&](auto q) {
        const Uint32Vec first = broadcast_uint32(weights.first[q][j]);
        const Uint32Vec second = broadcast_uint32(weights.second[q][j]);
        unroll<N>([&](auto n) { dots[q][n].add(bytes[n], first, second); });
      });
    }
    unroll<Q>([&](auto q) {
      const Vec scale = broadcast(weights.scales[q]);
      unroll<N>([&](auto n) {
        float* to = out + q * padded_size_ + d0 + n * LANES;
        const Vec sum = multiply_add(dots[q][n].total(weights.sums[q]), scale,
                                     load(to) * weights.decay[q]);
        store(to, sum);
      });
    });
  }

  int64_t padded_size_;
  const int32_t* block_table_;  // of the sequence
  uint8_t* cache_;              // of the head
};

// T: the dtype of queries, keys and values.
template <class T>
class Int8Blocks : public Int8BlocksBase {
 public:
  Int8Blocks(int64_t padded_size, const int32_t* block_table, Element* cache)
      : Int8BlocksBase(padded_size, block_table, cache) {}

  void write(int64_t position, const T* key, const T* value, int64_t head_size,
             AttentionScratch& scratch) const {
    const int64_t block = position / SIZE, place = position % SIZE;
    scratch.floats.resize(padded_size_);
    float* whole = scratch.floats.data();
    key_scales(block)[place] = quantize(key, head_size, INT8_MAX_VALUE, whole);
    uint8_t* to = keys(block) + place * 4;
    for (int64_t d = 0; d < head_size; d += 4, to += SIZE * 4)
      for (int64_t i = 0; i < 4; i++) to[i] = to_byte(whole[d + i]);
    value_scales(block)[place] = quantize(value, head_size, INT8_MAX_VALUE, whole);
    to = values(block) + place / 4 * padded_size_ * 4 + place % 4;
    for (int64_t d = 0; d < head_size; d++) to[d * 4] = to_byte(whole[d]);
  }

  // As FullBlocks::attend.
  template <int Q, class F>
  void attend(const T* q, int64_t q_stride, int64_t head_size, float scale, int64_t first_count,
              const F& write_own, BlockPrefetcher& prefetcher, float* sums, float* totals,
              AttentionScratch& scratch) const {
    scratch.floats.resize(padded_size_);
    scratch.integers.resize(Q * padded_size_ / 2);
    float* whole = scratch.floats.data();
    // A dot product of int8 and 16-bit integers fits int32: P * 128 * max_value < 2^31. The sums of
    // bytes, which are larger, may wrap around; subtracting 128 * sum(int16) undoes that.
    const int64_t max_value =
        std::min<int64_t>(INT16_MAX_VALUE,
                          std::numeric_limits<int32_t>::max() / (128 * padded_size_));
    Queries<Q> queries;
    for (int i = 0; i < Q; i++) {
      int32_t* words = scratch.integers.data() + i * padded_size_ / 2;
      const SplitInt16 int16s{words, words + padded_size_ / 4};
      std::fill(whole, whole + padded_size_, 0.0f);
      queries.scales[i] =
          scale * quantize(q + i * q_stride, head_size, static_cast<int32_t>(max_value), whole);
      Vec sum{};
      for (int64_t d = 0; d < padded_size_; d += LANES) {
        const Vec integers = load(whole + d);
        int16s.put(d, integers);
        sum = sum + integers;
      }
      queries.int16s[i] = int16s;
      queries.sums[i] = to_int(sum_lanes(sum));
    }
    std::fill(sums, sums + Q * padded_size_, 0.0f);
    OnlineSoftmax<Q> softmax;
    const int64_t n_blocks = (first_count + Q - 1 + SIZE - 1) / SIZE;
    for (int64_t block = 0; block < n_blocks; block++) {
      if (block + 1 == n_blocks) write_own();
      add_block<Q>(block, queries, first_count - block * SIZE, prefetcher, softmax, sums);
    }
    for (int i = 0; i < Q; i++) totals[i] = softmax.total[i];
  }
};

}  // namespace gptbatch
