// Causal attention of flat tokens over a paged cache, each query's sum in one fixed order.
//
//     gptbatch::attend(qkv, cache, pages, slots, positions, scale) -> out
//
//     qkv        (R, 3 H D)     float32 or bfloat16; rows from N on belong to nobody and come back as 0
//     cache      (H, P, page)   of qkv's dtype, or int8: pages of the keys and values of 16 positions, see below
//     pages      (slots, most)  int32: which page holds positions 16 i to 16 i + 15 of a slot
//     slots      (N,)           int64: the slot of each token
//     positions  (N,)           int64: its position there; all positions before it are in the cache or in this call
//     out        (R, H D)
//
// A page holds, depth being D rounded up to a multiple of 32, and the rest 0:
//
//     keys       (depth, 16)  one number of each position side by side; in bfloat16, where the CPU has a dot product of pairs
//                             (AVX512_BF16), two numbers of each: (depth / 2, 16, 2)
//     scales     (16,)        float32, with int8 only: a number of the cache times its position's scale is the key's
//     values     (16, depth)
//     scales     (16,)        likewise, of the values
//
// The keys and values of the N tokens are written to the cache before they are read. Arithmetic is in float32 for all types.
// An int8 is the number times 127 / the largest of its head and position, rounded to the nearest, ties to even.
//
// What a query gets depends on its own row, its position and the cache of its slot, and on nothing else:
//   a score is the sum over d = 0, 2, 4, ... and that over d = 1, 3, 5, ... by fused multiply-add, added to each other; with a
//   dot product of pairs, over every other pair of d;
//   the weights are exp(score - largest score), their total a sum lane by lane, key by key, then over the lanes;
//   an output is a sum over keys 0, 1, 2, ... by fused multiply-add, then one product with 1 / total.
// Queries of one sequence are taken up to four at a time and pages several at a time, which shares loads and changes no sum.
// The compiler must not contract or reorder: -ffp-contract=off, never -ffast-math.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common.h"

namespace {

using namespace gptbatch;
constexpr int64_t PAGE = 16;
constexpr int64_t PER_ROW = PAGE / LANES;  // vectors of one row of a page of keys
constexpr int QUERIES = 4;
static_assert(PAGE % LANES == 0 && 32 % (2 * LANES) == 0);

// T: the type of queries and outputs. C: that of the cache, which is T or int8_t.
#ifdef __AVX512BF16__
template <class C>
constexpr bool PAIRS = std::is_same_v<C, at::BFloat16>;
#else
template <class C>
constexpr bool PAIRS = false;
#endif

template <class C>
constexpr bool SCALED = std::is_same_v<C, int8_t>;

// How many pages to score at once: enough sums side by side to hide the latency of one. Small pages come in faster two by two.
template <class C>
constexpr int pages_at_once(int queries) {
  return std::max<int>(1, std::min<int>(SCALED<C> ? 2 : 4, 4 / (queries * PER_ROW)));
}

template <class C>
constexpr int64_t SCALES = SCALED<C> ? PAGE * static_cast<int64_t>(sizeof(float)) : 0;  // of a page, in numbers of type C

// 2 * LANES values as float32, in an order that is quick to load; `store_values` stores sums of such in the right one.
template <class C>
inline std::tuple<Vec, Vec> load_values(const C* from) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<C, at::BFloat16>) {
    const __m512i both = _mm512_loadu_si512(from);
    const __m512i even = _mm512_slli_epi32(both, 16), odd = _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
    return {_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd)};
  }
#endif
  return load_pair(from);
}

template <class C>
inline void store_values(const Vec& first, const Vec& second, float* to) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<C, at::BFloat16>) {
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

// One head of the cache, as one slot sees it.
template <class C>
struct Head {
  int64_t depth;
  const int32_t* pages;  // of the slot
  C* cache;              // of the head
  int64_t page_size() const { return 2 * (PAGE * depth + SCALES<C>); }
  C* keys(int64_t i) const { return cache + pages[i] * page_size(); }
  C* values(int64_t i) const { return keys(i) + PAGE * depth + SCALES<C>; }
  float* key_scales(int64_t i) const { return reinterpret_cast<float*>(keys(i) + PAGE * depth); }
  float* value_scales(int64_t i) const { return reinterpret_cast<float*>(values(i) + PAGE * depth); }
};

// The int8 of `count` numbers, calling put(d, int8) for each; returns their scale. NaN and infinity make the scale NaN; all is 0
// where the largest is below 1e-30.
template <class T, class F>
inline float quantize(const T* from, int64_t count, const F& put) {
  float largest = 0.0f, nothing = 0.0f;
  for (int64_t d = 0; d < count; d++) {
    const float number = static_cast<float>(from[d]);
    largest = std::max(largest, std::abs(number));
    nothing += number - number;
  }
  const float factor = largest >= 1e-30f && nothing == 0.0f ? 127.0f / largest : 0.0f;
  for (int64_t d = 0; d < count; d++)
    put(d, factor == 0.0f ? int8_t(0) : static_cast<int8_t>(std::nearbyint(static_cast<float>(from[d]) * factor)));
  return largest / 127.0f + nothing;
}

// Writes a key and a value to their place.
template <class T, class C>
inline void write(const Head<C>& head, int64_t position, const T* key, const T* value, int64_t head_size) {
  const int64_t page = position / PAGE, place = position % PAGE;
  C *keys = head.keys(page), *values = head.values(page) + place * head.depth;
  if constexpr (SCALED<C>) {
    head.key_scales(page)[place] = quantize(key, head_size, [&](int64_t d, int8_t number) { keys[d * PAGE + place] = number; });
    head.value_scales(page)[place] = quantize(value, head_size, [&](int64_t d, int8_t number) { values[d] = number; });
  } else {
    for (int64_t d = 0; d < head_size; d++) keys[PAIRS<C> ? d / 2 * 2 * PAGE + place * 2 + d % 2 : d * PAGE + place] = key[d];
    std::memcpy(values, value, head_size * sizeof(C));
  }
}

// scores[q][16 i + lane] = scale * (query q . key of that position), for the pages first to first + P - 1. Asks for their values, and for
// the keys of as many pages that follow.
template <class C, int Q, int P>
FLAT inline void score_pages(const Head<C>& head, const float* queries, float scale, int64_t first, int64_t n_pages, float* scores,
                             int64_t stride) {
  constexpr int64_t STEP = PAIRS<C> ? 4 : 2, STEP_BYTES = STEP * PAGE * static_cast<int64_t>(sizeof(C));
  const C* from[P];
  const char *values[P], *next[P];
  unroll<P>([&](auto p) {
    from[p] = head.keys(first + p);
    values[p] = reinterpret_cast<const char*>(head.values(first + p));
    next[p] = reinterpret_cast<const char*>(head.keys(std::min(first + P + p, n_pages - 1)));
  });
  Register sums[Q][P][PER_ROW][2];  // of even and of odd steps: one alone would wait for itself
  unroll<Q>([&](auto q) { unroll<P>([&](auto p) { unroll<PER_ROW>([&](auto g) { sums[q][p][g][0] = sums[q][p][g][1] = Vec(0.0f); }); }); });
  for (int64_t d = 0; d < head.depth; d += STEP) {
    unroll<P>([&](auto p) {
      unroll<(STEP_BYTES + CACHE_LINE - 1) / CACHE_LINE>([&](auto i) {
        __builtin_prefetch(values[p] + d / STEP * STEP_BYTES + i * CACHE_LINE);
        __builtin_prefetch(next[p] + d / STEP * STEP_BYTES + i * CACHE_LINE);
      });
#ifdef __AVX512BF16__
      if constexpr (PAIRS<C>) {
        unroll<2>([&](auto j) {
          const __m512i key = _mm512_loadu_si512(from[p] + (d + 2 * j) * PAGE);
          unroll<Q>([&](auto q) {
            int two;
            __builtin_memcpy(&two, reinterpret_cast<const C*>(queries) + q * head.depth + d + 2 * j, sizeof(two));
            const __m512i pair = _mm512_set1_epi32(two);
            sums[q][p][0][j] = _mm512_dpbf16_ps(sums[q][p][0][j], (__m512bh)pair, (__m512bh)key);
          });
        });
        return;
      }
#endif
      Register key[2 * PER_ROW];
      unroll<PER_ROW>([&](auto j) { std::tie(key[2 * j], key[2 * j + 1]) = load_pair(from[p] + d * PAGE + 2 * j * LANES); });
      unroll<Q>([&](auto q) {
        unroll<2>([&](auto j) {
          const Vec number(queries[q * head.depth + d + j]);
          unroll<PER_ROW>([&](auto g) { sums[q][p][g][j] = multiply_add(number, key[j * PER_ROW + g], sums[q][p][g][j]); });
        });
      });
    });
  }
  unroll<P>([&](auto p) {
    unroll<PER_ROW>([&](auto g) {
      Vec factor(scale);
      if constexpr (SCALED<C>) factor = factor * Vec::loadu(head.key_scales(first + p) + g * LANES);
      unroll<Q>([&](auto q) {
        ((Vec(sums[q][p][g][0]) + Vec(sums[q][p][g][1])) * factor).store(scores + q * stride + (first + p) * PAGE + g * LANES);
      });
    });
  });
}

template <class C, int Q>
inline void score(const Head<C>& head, const float* queries, float scale, int64_t n_pages, float* scores, int64_t stride) {
  constexpr int P = pages_at_once<C>(Q);
  int64_t page = 0;
  for (; page + P <= n_pages; page += P) score_pages<C, Q, P>(head, queries, scale, page, n_pages, scores, stride);
  if constexpr (P > 2)
    for (; page + 2 <= n_pages; page += 2) score_pages<C, Q, 2>(head, queries, scale, page, n_pages, scores, stride);
  for (; page < n_pages; page++) score_pages<C, Q, 1>(head, queries, scale, page, n_pages, scores, stride);
}

// Turns `count` scores into weights exp(score - largest) and returns 1 / their total. What follows in the last vector is 0.
inline float weigh(float* scores, int64_t count) {
  const int64_t end = (count + LANES - 1) / LANES * LANES;
  std::fill(scores + count, scores + end, -std::numeric_limits<float>::infinity());
  Vec top = Vec::loadu(scores);
  for (int64_t k = LANES; k < end; k += LANES) top = at::vec::maximum(top, Vec::loadu(scores + k));
  const Vec largest(at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top));
  Vec total(0.0f);
  for (int64_t k = 0; k < end; k += LANES) {
    const Vec weight = (Vec::loadu(scores + k) - largest).exp();
    weight.store(scores + k);
    total = total + weight;
  }
  return 1.0f / at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, total);
}

// The weights of `count` keys times the scales of their values. Weights behind them, which nobody reads, may become NaN.
inline void scale_weights(const Head<int8_t>& head, int64_t count, float* weights) {
  for (int64_t k = 0; k < count; k += LANES) (Vec::loadu(weights + k) * Vec::loadu(head.value_scales(k / PAGE) + k % PAGE)).store(weights + k);
}

// out[q][d0 ...] = sum over keys of weight * value, for N pairs of vectors; query q sees first_count + q keys.
template <class C, int Q, int N>
FLAT inline void mix_columns(const Head<C>& head, const float* weights, int64_t stride, int64_t first_count, int64_t d0, float* out) {
  Register sums[Q][2 * N], value[2 * N];
  unroll<Q>([&](auto q) { unroll<2 * N>([&](auto c) { sums[q][c] = Vec(0.0f); }); });
  const auto load = [&](const C* row) {
    unroll<N>([&](auto c) { std::tie(value[2 * c], value[2 * c + 1]) = load_values(row + 2 * c * LANES); });
  };
  const auto add = [&](auto q, int64_t k) {
    const Vec weight(weights[q * stride + k]);
    unroll<2 * N>([&](auto c) { sums[q][c] = multiply_add(weight, value[c], sums[q][c]); });
  };
  for (int64_t k = 0; k < first_count;) {
    const C* row = head.values(k / PAGE) + d0;
    for (const int64_t end = std::min(first_count, k + PAGE); k < end; k++, row += head.depth) {
      load(row);
      unroll<Q>([&](auto q) { add(q, k); });
    }
  }
  unroll<Q - 1>([&](auto later) {  // keys that only the later queries see
    const int64_t k = first_count + later;
    load(head.values(k / PAGE) + k % PAGE * head.depth + d0);
    unroll<Q>([&](auto q) {
      if constexpr (q > later) add(q, k);
    });
  });
  unroll<Q>([&](auto q) {
    unroll<N>([&](auto c) { store_values<C>(sums[q][2 * c], sums[q][2 * c + 1], out + q * head.depth + d0 + 2 * c * LANES); });
  });
}

template <class C, int Q>
inline void mix(const Head<C>& head, const float* weights, int64_t stride, int64_t first_count, float* out) {
  int64_t d = 0;
  if constexpr (Q == 1) {  // read whole rows: a lone query waits for memory
    for (; d + 8 * LANES <= head.depth; d += 8 * LANES) mix_columns<C, Q, 4>(head, weights, stride, first_count, d, out);
    for (; d + 4 * LANES <= head.depth; d += 4 * LANES) mix_columns<C, Q, 2>(head, weights, stride, first_count, d, out);
  }
  for (; d < head.depth; d += 2 * LANES) mix_columns<C, Q, 1>(head, weights, stride, first_count, d, out);
}

// Q queries of one head at consecutive positions of one slot, the first of which sees first_count keys.
template <class T, class C, int Q>
void attend_queries(const Head<C>& head, const T* q, int64_t q_stride, int64_t head_size, float scale, int64_t first_count, T* out,
                    int64_t out_stride, std::vector<float>& scratch) {
  const int64_t last_count = first_count + Q - 1, n_pages = (last_count + PAGE - 1) / PAGE, stride = n_pages * PAGE;
  scratch.resize(Q * (2 * head.depth + stride));
  float *queries = scratch.data(), *mixed = queries + Q * head.depth, *scores = mixed + Q * head.depth;
  using Query = std::conditional_t<PAIRS<C>, T, float>;
  for (int i = 0; i < Q; i++) {
    Query* query = reinterpret_cast<Query*>(queries) + i * head.depth;
    for (int64_t d = 0; d < head_size; d++) query[d] = static_cast<Query>(q[i * q_stride + d]);
    std::fill(query + head_size, query + head.depth, Query(0.0f));
  }
  score<C, Q>(head, queries, scale, n_pages, scores, stride);
  float inverse[Q];
  for (int i = 0; i < Q; i++) {
    inverse[i] = weigh(scores + i * stride, first_count + i);
    if constexpr (SCALED<C>) scale_weights(head, first_count + i, scores + i * stride);
  }
  mix<C, Q>(head, scores, stride, first_count, mixed);
  for (int i = 0; i < Q; i++) {
    const Vec factor(inverse[i]);
    for (int64_t d = 0; d < head_size; d += 2 * LANES) {
      const float* from = mixed + i * head.depth + d;
      const Vec low = Vec::loadu(from) * factor, high = Vec::loadu(from + LANES) * factor;
      const int64_t count = std::min(2 * LANES, head_size - d);
      T* to = out + i * out_stride + d;
      if constexpr (std::is_same_v<T, float>) {
        low.store(to, std::min(LANES, count));
        if (count > LANES) high.store(to + LANES, count - LANES);
      } else {
        at::vec::convert_from_float<T>(low, high).store(to, count);
      }
    }
  }
}

template <class T, class C>
void run(const at::Tensor& qkv, at::Tensor& cache, const at::Tensor& pages, const at::Tensor& slots, const at::Tensor& positions,
         double scale, int64_t depth, at::Tensor& out) {
  const int64_t tokens = slots.size(0), heads = cache.size(0), head_stride = cache.size(1) * cache.size(2), most = pages.size(1);
  const int64_t width = out.size(1), head_size = width / heads;
  const T* x = qkv.const_data_ptr<T>();
  C* numbers = cache.data_ptr<C>();
  T* y = out.data_ptr<T>();
  const int32_t* table = pages.const_data_ptr<int32_t>();
  const int64_t *slot = slots.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  const auto head_of = [&](int64_t t, int64_t h) { return Head<C>{depth, table + slot[t] * most, numbers + h * head_stride}; };

  // writes what token t adds to the cache for head h
  const auto add = [&](int64_t t, int64_t h) {
    const T* key = x + t * 3 * width + width + h * head_size;
    write(head_of(t, h), position[t], key, key + width, head_size);
  };
  struct Tile {
    int64_t token, queries;
    bool alone;  // nobody else in the call reads what its token adds to the cache
  };
  std::vector<Tile> tiles;  // up to QUERIES tokens at consecutive positions of one slot
  for (int64_t t = 0; t < tokens;) {
    int64_t n = 1;
    while (n < QUERIES && t + n < tokens && slot[t + n] == slot[t] && position[t + n] == position[t] + n) n++;
    n = n == QUERIES ? n : 1;
    // a page that is not whole yet is nobody else's
    const bool alone = n == 1 && position[t] % PAGE != PAGE - 1 && (t == 0 || slot[t - 1] != slot[t]) && (t + 1 == tokens || slot[t + 1] != slot[t]);
    tiles.push_back({t, n, alone});
    t += n;
  }
  // what others read is written first; a token that is alone writes when it is its turn, and finds it in the CPU's cache
  std::vector<int64_t> early;
  for (const Tile& tile : tiles)
    if (!tile.alone)
      for (int64_t i = 0; i < tile.queries; i++) early.push_back(tile.token + i);
  for_each(static_cast<int64_t>(early.size()), 4, [&](int64_t i) {
    for (int64_t h = 0; h < heads; h++) add(early[i], h);
  });

  const int64_t n_tiles = static_cast<int64_t>(tiles.size());
  for_each(heads * n_tiles, 4, [&](int64_t i) {
    static thread_local std::vector<float> scratch;
    const auto [t, queries, alone] = tiles[i % n_tiles];
    const int64_t h = i / n_tiles;
    if (alone) add(t, h);
    const auto attend = queries == QUERIES ? attend_queries<T, C, QUERIES> : attend_queries<T, C, 1>;
    attend(head_of(t, h), x + t * 3 * width + h * head_size, 3 * width, head_size, static_cast<float>(scale), position[t] + 1,
           y + t * width + h * head_size, width, scratch);
  });
  std::fill(y + tokens * width, y + out.numel(), T(0));
}

at::Tensor attend(const at::Tensor& qkv, at::Tensor cache, const at::Tensor& pages, const at::Tensor& slots, const at::Tensor& positions,
                  double scale) {
  TORCH_CHECK(qkv.dim() == 2 && cache.dim() == 3 && qkv.is_contiguous() && cache.is_contiguous() && pages.is_contiguous() &&
                  slots.is_contiguous() && positions.is_contiguous(),
              "attend: contiguous tensors are needed");
  const bool scaled = cache.scalar_type() == at::kChar;
  const int64_t head_size = qkv.size(1) / (3 * cache.size(0)), depth = (head_size + 31) / 32 * 32;
  TORCH_CHECK(qkv.size(1) == 3 * cache.size(0) * head_size && cache.size(2) == 2 * (PAGE * depth + (scaled ? SCALES<int8_t> : 0)) &&
                  slots.sizes() == positions.sizes() && slots.size(0) <= qkv.size(0),
              "attend: the shapes do not fit each other");
  TORCH_CHECK(scaled || cache.scalar_type() == qkv.scalar_type(), "attend: the cache is of the type of qkv, or int8");
  at::Tensor out = at::empty({qkv.size(0), qkv.size(1) / 3}, qkv.options());
  const auto with = [&](auto of_qkv, auto of_cache) {
    run<decltype(of_qkv), decltype(of_cache)>(qkv, cache, pages, slots, positions, scale, depth, out);
  };
  if (qkv.scalar_type() == at::kFloat) {
    scaled ? with(float(), int8_t()) : with(float(), float());
  } else {
    scaled ? with(at::BFloat16(), int8_t()) : with(at::BFloat16(), at::BFloat16());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def("attend(Tensor qkv, Tensor(a!) cache, Tensor pages, Tensor slots, Tensor positions, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) { library.impl("attend", attend); }
