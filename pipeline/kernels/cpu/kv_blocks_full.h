// Pages of the network's own type, and the attention of queries over them: all scores, then their weights, then the values.
//
// A page holds the keys and values of 16 positions, depth being D rounded up to a multiple of 32, and the rest 0:
//
//     keys       (depth, 16)  one number of each position side by side; in bfloat16, where the CPU has a dot product of pairs
//                             (AVX512_BF16), two numbers of each: (depth / 2, 16, 2)
//     values     (16, depth)
//
// A score is the sum over d = 0, 2, 4, ... and that over d = 1, 3, 5, ... by fused multiply-add, added to each other; with a dot product
// of pairs, over every other pair of d. The weights are exp(score - largest score), their total a sum lane by lane, key by key, then over
// the lanes. An output is a sum over keys 0, 1, 2, ... by fused multiply-add. Pages are taken several at a time, which changes no sum.

#pragma once

#include <cstring>
#include <limits>

#include "attention.h"

namespace gptbatch {

// 2 * LANES values as float32, in an order that is quick to load; `store_values` stores sums of such in the right one.
template <class T>
inline std::tuple<Vec, Vec> load_values(const T* from) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const __m512i both = _mm512_loadu_si512(from);
    const __m512i even = _mm512_slli_epi32(both, 16), odd = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
    return {_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)};
  }
#endif
  return load_pair(from);
}

template <class T>
inline void store_values(const Vec& first, const Vec& second, float* to) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(first, low, second));
    _mm512_storeu_ps(to + LANES, _mm512_permutex2var_ps(first, high, second));
    return;
  }
#endif
  first.store(to);
  second.store(to + LANES);
}

// Turns `count` scores into weights exp(score - largest) and returns their total. What follows in the last vector is 0.
inline float weigh(float* scores, int64_t count) {
  const int64_t end = (count + LANES - 1) / LANES * LANES;
  std::fill(scores + count, scores + end, -std::numeric_limits<float>::infinity());
  Vec top = Vec::loadu(scores);
  for (int64_t k = LANES; k < end; k += LANES) top = at::vec::maximum(top, Vec::loadu(scores + k));
  const Vec largest(largest_of(top));
  Vec total(0.0f);
  for (int64_t k = 0; k < end; k += LANES) {
    const Vec weight = (Vec::loadu(scores + k) - largest).exp();
    weight.store(scores + k);
    total = total + weight;
  }
  return sum_of(total);
}

// One head of the cache, as one slot sees it. T: the type of queries, keys and values, and of the cache.
template <class T>
class FullPages {
 public:
  using Number = T;
  static constexpr int64_t SIZE = 16;

  static int64_t page_numbers(int64_t depth) { return 2 * SIZE * depth; }

  FullPages(int64_t depth, const int32_t* pages, T* cache) : depth_(depth), pages_(pages), cache_(cache) {}

  // Writes a key and a value to their place.
  void write(int64_t position, const T* key, const T* value, int64_t head_size, Scratch&) const {
    const int64_t page = position / SIZE, place = position % SIZE;
    T* to = keys(page);
    for (int64_t d = 0; d < head_size; d++) to[PAIRS ? d / 2 * 2 * SIZE + place * 2 + d % 2 : d * SIZE + place] = key[d];
    std::memcpy(values(page) + place * depth_, value, head_size * sizeof(T));
  }

  // Q queries at consecutive positions, the first of which sees first_count keys: mixed (Q, depth) and totals (Q,), which divide it.
  // write_own() is called before the last page is read; it has no use for the scratch.
  template <int Q, class F>
  void attend(const T* q, int64_t q_stride, int64_t head_size, float scale, int64_t first_count, const F& write_own, Lookahead& ahead,
              float* mixed, float* totals, Scratch& scratch) const {
    const int64_t n_pages = (first_count + Q - 1 + SIZE - 1) / SIZE, stride = n_pages * SIZE;
    scratch.numbers.resize(Q * (depth_ + stride));
    float *queries = scratch.numbers.data(), *scores = queries + Q * depth_;
    using Query = std::conditional_t<PAIRS, T, float>;
    for (int i = 0; i < Q; i++) {
      Query* query = reinterpret_cast<Query*>(queries) + i * depth_;
      for (int64_t d = 0; d < head_size; d++) query[d] = static_cast<Query>(q[i * q_stride + d]);
      std::fill(query + head_size, query + depth_, Query(0.0f));
    }
    score<Q>(queries, scale, n_pages, scores, stride, write_own, ahead);
    for (int i = 0; i < Q; i++) totals[i] = weigh(scores + i * stride, first_count + i);
    mix<Q>(scores, stride, first_count, mixed, ahead);
  }

  // Adds the halves of a sequence's pages, in the order in which they are read.
  static void order(const int32_t* pages, int64_t count, std::vector<int32_t>& halves) {
    for (int64_t i = 0; i < count; i++) halves.push_back(2 * pages[i]);
    for (int64_t i = 0; i < count; i++) halves.push_back(2 * pages[i] + 1);
  }

 private:
  static constexpr int64_t PER_ROW = SIZE / LANES;  // vectors of one row of a page of keys
  static_assert(SIZE % LANES == 0 && 32 % (2 * LANES) == 0);
#ifdef __AVX512BF16__
  static constexpr bool PAIRS = std::is_same_v<T, at::BFloat16>;
#else
  static constexpr bool PAIRS = false;
#endif

  T* keys(int64_t i) const { return cache_ + pages_[i] * page_numbers(depth_); }
  T* values(int64_t i) const { return keys(i) + SIZE * depth_; }

  // scores[q][16 i + lane] = scale * (query q . key of that position).
  template <int Q, class F>
  void score(const float* queries, float scale, int64_t n_pages, float* scores, int64_t stride, const F& write_own, Lookahead& ahead) const {
    constexpr int P = std::max<int>(1, 4 / (Q * PER_ROW));  // pages at once: enough sums side by side to hide the latency of one
    int64_t page = 0;
    const auto take = [&](auto count) {
      for (; page + count <= n_pages; page += count) {
        if (page + count == n_pages) write_own();
        score_pages<Q, count>(queries, scale, page, scores, stride, ahead);
      }
    };
    take(std::integral_constant<int, P>());
    if constexpr (P > 2) take(std::integral_constant<int, 2>());
    take(std::integral_constant<int, 1>());
  }

  // For the pages first to first + P - 1.
  template <int Q, int P>
  FLAT void score_pages(const float* queries, float scale, int64_t first, float* scores, int64_t stride, Lookahead& ahead) const {
    constexpr int64_t STEP = PAIRS ? 4 : 2;
    const int64_t asks = (P * ahead.pace() * STEP + depth_ - 1) / depth_;
    const T* from[P];
    unroll<P>([&](auto p) { from[p] = keys(first + p); });
    Register sums[Q][P][PER_ROW][2];  // of even and of odd steps: one alone would wait for itself
    unroll<Q>([&](auto q) { unroll<P>([&](auto p) { unroll<PER_ROW>([&](auto g) { sums[q][p][g][0] = sums[q][p][g][1] = Vec(0.0f); }); }); });
    for (int64_t d = 0; d < depth_; d += STEP) {
      ahead.ask(asks);
      unroll<P>([&](auto p) {
#ifdef __AVX512BF16__
        if constexpr (PAIRS) {
          unroll<2>([&](auto j) {
            const __m512i key = _mm512_loadu_si512(from[p] + (d + 2 * j) * SIZE);
            unroll<Q>([&](auto q) {
              int two;
              __builtin_memcpy(&two, reinterpret_cast<const T*>(queries) + q * depth_ + d + 2 * j, sizeof(two));
              const __m512i pair = _mm512_set1_epi32(two);
              sums[q][p][0][j] = _mm512_dpbf16_ps(sums[q][p][0][j], (__m512bh)pair, (__m512bh)key);
            });
          });
          return;
        }
#endif
        Register key[2 * PER_ROW];
        unroll<PER_ROW>([&](auto j) { std::tie(key[2 * j], key[2 * j + 1]) = load_pair(from[p] + d * SIZE + 2 * j * LANES); });
        unroll<Q>([&](auto q) {
          unroll<2>([&](auto j) {
            const Vec number(queries[q * depth_ + d + j]);
            unroll<PER_ROW>([&](auto g) { sums[q][p][g][j] = multiply_add(number, key[j * PER_ROW + g], sums[q][p][g][j]); });
          });
        });
      });
    }
    unroll<P>([&](auto p) {
      unroll<PER_ROW>([&](auto g) {
        unroll<Q>([&](auto q) {
          ((Vec(sums[q][p][g][0]) + Vec(sums[q][p][g][1])) * Vec(scale)).store(scores + q * stride + (first + p) * SIZE + g * LANES);
        });
      });
    });
  }

  template <int Q>
  void mix(const float* weights, int64_t stride, int64_t first_count, float* mixed, Lookahead& ahead) const {
    int64_t d = 0;
    if constexpr (Q == 1) {  // read whole rows: a lone query waits for memory
      for (; d + 8 * LANES <= depth_; d += 8 * LANES) mix_columns<Q, 4>(weights, stride, first_count, d, mixed, ahead);
      for (; d + 4 * LANES <= depth_; d += 4 * LANES) mix_columns<Q, 2>(weights, stride, first_count, d, mixed, ahead);
    }
    for (; d < depth_; d += 2 * LANES) mix_columns<Q, 1>(weights, stride, first_count, d, mixed, ahead);
  }

  // mixed[q][d0 ...] = sum over keys of weight * value, for N pairs of vectors; query q sees first_count + q keys.
  template <int Q, int N>
  FLAT void mix_columns(const float* weights, int64_t stride, int64_t first_count, int64_t d0, float* mixed, Lookahead& ahead) const {
    Register sums[Q][2 * N], value[2 * N];
    unroll<Q>([&](auto q) { unroll<2 * N>([&](auto c) { sums[q][c] = Vec(0.0f); }); });
    const auto load = [&](const T* row) {
      unroll<N>([&](auto c) { std::tie(value[2 * c], value[2 * c + 1]) = load_values(row + 2 * c * LANES); });
    };
    const auto add = [&](auto q, int64_t k) {
      const Vec weight(weights[q * stride + k]);
      unroll<2 * N>([&](auto c) { sums[q][c] = multiply_add(weight, value[c], sums[q][c]); });
    };
    for (int64_t k = 0; k < first_count;) {
      if (d0 == 0) ahead.ask(ahead.pace());
      const T* row = values(k / SIZE) + d0;
      for (const int64_t end = std::min(first_count, k + SIZE); k < end; k++, row += depth_) {
        load(row);
        unroll<Q>([&](auto q) { add(q, k); });
      }
    }
    unroll<Q - 1>([&](auto later) {  // keys that only the later queries see
      const int64_t k = first_count + later;
      load(values(k / SIZE) + k % SIZE * depth_ + d0);
      unroll<Q>([&](auto q) {
        if constexpr (q > later) add(q, k);
      });
    });
    unroll<Q>([&](auto q) {
      unroll<N>([&](auto c) { store_values<T>(sums[q][2 * c], sums[q][2 * c + 1], mixed + q * depth_ + d0 + 2 * c * LANES); });
    });
  }

  int64_t depth_;
  const int32_t* pages_;  // of the slot
  T* cache_;              // of the head
};

}  // namespace gptbatch
