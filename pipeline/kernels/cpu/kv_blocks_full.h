// KV blocks in the model's dtype, and the attention of queries over them.
//
// A block holds 16 positions of one head. P, padded_size_ in the code, is the head size D padded to
// a multiple of 32 with 0:
//
//     keys    (P, 16)  transposed. In bfloat16 with AVX512_BF16: (P / 2, 16, 2), pairs interleaved
//     values  (16, P)
//
// Naive code that computes the same:
//
//     for (k = 0; k < n_keys; k++) score[k] = scale * dot(query, key[k]);
//     for (k = 0; k < n_keys; k++) weight[k] = exp(score[k] - max(score));
//     for (k = 0; k < n_keys; k++)
//       for (d = 0; d < D; d++) out[d] = fma(weight[k], value[k][d], out[d]);
//     out *= 1 / sum(weight);  // in attention_tiles.h
//
// Reduction orders: a dot product is the sum over even d plus the sum over odd d, each by fused
// multiply-add in ascending order (with pairs: over every other pair). The sum of weights has 32
// lanes, by position modulo 32, and then a fixed tree (LogicalLanes). out[d] is one chain of fused
// multiply-adds from 0, over keys in ascending order. Taking several blocks at once changes no
// order.

#pragma once

#include <cstring>
#include <limits>

#include "attention_scratch.h"
#include "functions.h"
#include "kv_blocks_full_avx512.h"
#include "prefetch.h"

namespace gptbatch {

// Loads 2 * LANES values as float32, in the order that store_values undoes.
template <class T>
inline void load_values(const T* from, Vec& first, Vec& second) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, BFloat16>) return load_even_odd(from, first, second);
#endif
  first = load(from);
  second = load(from + LANES);
}

template <class T>
inline void store_values(float* to, Vec first, Vec second) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, BFloat16>) return store_even_odd(to, first, second);
#endif
  store(to, first);
  store(to + LANES, second);
}

// Softmax without the division: scores become exp(score - max), and their sum is returned. The
// lanes after `count` in the last vector become 0.
inline float exp_and_sum(float* scores, int64_t count) {
  const int64_t end = (count + LANES - 1) / LANES * LANES;
  std::fill(scores + count, scores + end, -std::numeric_limits<float>::infinity());
  Vec lane_max = load(scores);
  for (int64_t k = LANES; k < end; k += LANES)
    lane_max = maximum(lane_max, load(scores + k));
  const float max = max_lanes(lane_max);
  LogicalLanes total;
  for (int64_t k = 0; k < end; k += LogicalLanes::COUNT) {
    UNROLL
    for (int v = 0; v < LogicalLanes::VECTORS; v++) {
      if (k + v * LANES >= end) break;
      float* place = scores + k + v * LANES;
      const Vec weight = exp_up_to_limit(load(place) - max);
      store(place, weight);
      total.lanes[v] = total.lanes[v] + weight;
    }
  }
  return total.total();
}

// One head of the cache, through the block table of one sequence. T: the dtype of the model.
template <class T>
class FullBlocks {
 public:
  using Element = T;
  static constexpr int64_t SIZE = FULL_BLOCK_SIZE;

  static int64_t block_elements(int64_t padded_size) { return 2 * SIZE * padded_size; }

  FullBlocks(int64_t padded_size, const int32_t* block_table, T* cache)
      : padded_size_(padded_size), block_table_(block_table), cache_(cache) {}

  void write(int64_t position, const T* key, const T* value, int64_t head_size,
             AttentionScratch&) const {
    const int64_t block = position / SIZE, place = position % SIZE;
    T* to = keys(block);
    for (int64_t d = 0; d < head_size; d++)
      to[INTERLEAVED ? d / 2 * 2 * SIZE + place * 2 + d % 2 : d * SIZE + place] = key[d];
    std::memcpy(values(block) + place * padded_size_, value, head_size * sizeof(T));
  }

  // Attention of Q queries at consecutive positions; the first one sees first_count keys. Writes
  // the weighted sums of values (Q, P) and the sums of weights (Q,), by which the caller divides.
  // Calls write_own() before it reads the last block.
  template <int Q, class F>
  void attend(const T* q, int64_t q_stride, int64_t head_size, float scale, int64_t first_count,
              const F& write_own, BlockPrefetcher& prefetcher, float* sums, float* totals,
              AttentionScratch& scratch) const {
    const int64_t n_blocks = (first_count + Q - 1 + SIZE - 1) / SIZE, stride = n_blocks * SIZE;
    scratch.floats.resize(Q * (padded_size_ + stride));
    float *queries = scratch.floats.data(), *scores = queries + Q * padded_size_;
    using Query = std::conditional_t<INTERLEAVED, T, float>;
    for (int i = 0; i < Q; i++) {
      Query* query = reinterpret_cast<Query*>(queries) + i * padded_size_;
      for (int64_t d = 0; d < head_size; d++) query[d] = static_cast<Query>(q[i * q_stride + d]);
      std::fill(query + head_size, query + padded_size_, Query{});
    }
    score<Q>(queries, scale, n_blocks, scores, stride, write_own, prefetcher);
    for (int i = 0; i < Q; i++) totals[i] = exp_and_sum(scores + i * stride, first_count + i);
    weigh_values<Q>(scores, stride, first_count, sums, prefetcher);
  }

  // Appends the half blocks of a sequence in reading order: all keys, then all values.
  static void append_reading_order(const int32_t* blocks, int64_t count,
                                   std::vector<int32_t>& halves) {
    for (int64_t i = 0; i < count; i++) halves.push_back(2 * blocks[i]);
    for (int64_t i = 0; i < count; i++) halves.push_back(2 * blocks[i] + 1);
  }

 private:
  static constexpr int64_t KEY_VECTORS = SIZE / LANES;  // per row of a block of keys
  static_assert(SIZE % LANES == 0 && HEAD_SIZE_MULTIPLE % (2 * LANES) == 0);
#ifdef __AVX512BF16__
  static constexpr bool INTERLEAVED = std::is_same_v<T, BFloat16>;
#else
  static constexpr bool INTERLEAVED = false;
#endif

  T* keys(int64_t i) const { return cache_ + block_table_[i] * block_elements(padded_size_); }
  T* values(int64_t i) const { return keys(i) + SIZE * padded_size_; }

  // scores[q][position] = scale * (query q . key of the position).
  template <int Q, class F>
  void score(const float* queries, float scale, int64_t n_blocks, float* scores, int64_t stride,
             const F& write_own, BlockPrefetcher& prefetcher) const {
    // Blocks at once: enough independent sums to hide the latency of fused multiply-add.
    constexpr int B = std::max<int>(1, 4 / (Q * KEY_VECTORS));
    int64_t block = 0;
    const auto take = [&](auto count) {
      for (; block + count <= n_blocks; block += count) {
        if (block + count == n_blocks) write_own();
        score_blocks<Q, count>(queries, scale, block, scores, stride, prefetcher);
      }
    };
    take(std::integral_constant<int, B>());
    if constexpr (B > 2) take(std::integral_constant<int, 2>());
    take(std::integral_constant<int, 1>());
  }

  // Micro-kernel: scores of B blocks from `first` on.
  //
  // Register map (Q B KEY_VECTORS 2 sums: 8, but 16 with vectors of 8 lanes and four queries. AVX2
  // has 16 registers in all, so there GCC spills some of them. At the end of a row of blocks, B is
  // 2 or 1, and the sums are fewer):
  //
  //     sums[q][b][v][0]  even steps of d, query q, block b, LANES positions
  //     sums[q][b][v][1]  odd steps of d; one chain alone would wait for its own latency
  //     key[...]          2 * KEY_VECTORS vectors: d and d + 1 of the block's positions
  //     element           one element of the query in all lanes
  //
  // With AVX512_BF16, [0] and [1] are every other pair of d: a step takes d to d + 3, and an
  // element and a key are pairs.
  template <int Q, int B>
  FLAT void score_blocks(const float* queries, float scale, int64_t first, float* scores,
                         int64_t stride, BlockPrefetcher& prefetcher) const {
    constexpr int64_t D_STEP = INTERLEAVED ? 4 : 2;
    const int64_t prefetches =
        (B * prefetcher.rate() * D_STEP + padded_size_ - 1) / padded_size_;
    const T* from[B];
    unroll<B>([&](auto b) { from[b] = keys(first + b); });
    Vec sums[Q][B][KEY_VECTORS][2] = {};
    for (int64_t d = 0; d < padded_size_; d += D_STEP) {
      prefetcher.prefetch(prefetches);
      unroll<B>([&](auto b) {
#ifdef __AVX512BF16__
        if constexpr (INTERLEAVED) {
          unroll<2>([&](auto j) {
            const __m512i key = _mm512_loadu_si512(from[b] + (d + 2 * j) * SIZE);
            unroll<Q>([&](auto q) {
              const T* query = reinterpret_cast<const T*>(queries) + q * padded_size_ + d + 2 * j;
              sums[q][b][0][j] = add_pair_products(sums[q][b][0][j], query, key);
            });
          });
          return;
        }
#endif
        Vec key[2 * KEY_VECTORS];
        unroll<2 * KEY_VECTORS>([&](auto j) { key[j] = load(from[b] + d * SIZE + j * LANES); });
        unroll<Q>([&](auto q) {
          unroll<2>([&](auto j) {
            const Vec element = broadcast(queries[q * padded_size_ + d + j]);
            unroll<KEY_VECTORS>([&](auto v) {
              sums[q][b][v][j] = multiply_add(element, key[j * KEY_VECTORS + v], sums[q][b][v][j]);
            });
          });
        });
      });
    }
    unroll<B>([&](auto b) {
      unroll<KEY_VECTORS>([&](auto v) {
        unroll<Q>([&](auto q) {
          store(scores + q * stride + (first + b) * SIZE + v * LANES,
                (sums[q][b][v][0] + sums[q][b][v][1]) * scale);
        });
      });
    });
  }

  template <int Q>
  void weigh_values(const float* weights, int64_t stride, int64_t first_count, float* out,
                    BlockPrefetcher& prefetcher) const {
    int64_t d = 0;
    // One query alone is bound by memory: it reads whole rows of values.
    if constexpr (Q == 1) {
      for (; d + 8 * LANES <= padded_size_; d += 8 * LANES)
        weigh_columns<Q, 4>(weights, stride, first_count, d, out, prefetcher);
      for (; d + 4 * LANES <= padded_size_; d += 4 * LANES)
        weigh_columns<Q, 2>(weights, stride, first_count, d, out, prefetcher);
    }
    for (; d < padded_size_; d += 2 * LANES)
      weigh_columns<Q, 1>(weights, stride, first_count, d, out, prefetcher);
  }

  // Micro-kernel: out[q][d0 + ...] = sum over keys of weight * value, for N pairs of vectors. Query
  // q sees first_count + q keys.
  //
  // Register map:
  //
  //     sums[q][c]  query q, LANES columns: Q * 2 N registers
  //     value[c]    LANES columns of one key's value: 2 N registers
  //     weight      of one query and key in all lanes
  template <int Q, int N>
  FLAT void weigh_columns(const float* weights, int64_t stride, int64_t first_count, int64_t d0,
                          float* out, BlockPrefetcher& prefetcher) const {
    Vec sums[Q][2 * N] = {}, value[2 * N];
    const auto load = [&](const T* row) {
      unroll<N>([&](auto c) {
        load_values(row + 2 * c * LANES, value[2 * c], value[2 * c + 1]);
      });
    };
    const auto add = [&](auto q, int64_t k) {
      const Vec weight = broadcast(weights[q * stride + k]);
      unroll<2 * N>([&](auto c) { sums[q][c] = multiply_add(weight, value[c], sums[q][c]); });
    };
    for (int64_t k = 0; k < first_count;) {
      if (d0 == 0) prefetcher.prefetch(prefetcher.rate());
      const T* row = values(k / SIZE) + d0;
      for (const int64_t end = std::min(first_count, k + SIZE); k < end; k++, row += padded_size_) {
        load(row);
        unroll<Q>([&](auto q) { add(q, k); });
      }
    }
    // Keys that only the later queries see.
    unroll<Q - 1>([&](auto later) {
      const int64_t k = first_count + later;
      load(values(k / SIZE) + k % SIZE * padded_size_ + d0);
      unroll<Q>([&](auto q) {
        if constexpr (q > later) add(q, k);
      });
    });
    unroll<Q>([&](auto q) {
      unroll<N>([&](auto c) {
        float* to = out + q * padded_size_ + d0 + 2 * c * LANES;
        store_values<T>(to, sums[q][2 * c], sums[q][2 * c + 1]);
      });
    });
  }

  int64_t padded_size_;
  const int32_t* block_table_;  // of the sequence
  T* cache_;                    // of the head
};

}  // namespace gptbatch
