// Causal attention of flat tokens over a paged cache, each query's sum in one fixed order.
//
//     gptbatch::attend(qkv, keys, values, pages, slots, positions, scale) -> out
//
//     qkv        (R, 3 H D)         float32 or bfloat16; rows from N on belong to nobody and come back as 0
//     keys       (H, P, depth, 16)  the keys of 16 positions a page, one number of each side by side; in bfloat16, where the CPU
//                                   has a dot product of pairs (AVX512_BF16), two numbers of each: (H, P, depth / 2, 16, 2)
//     values     (H, P, 16, depth)  the values of the same positions
//     pages      (slots, most)      int32: which page holds positions 16 i to 16 i + 15 of a slot
//     slots      (N,)               int64: the slot of each token
//     positions  (N,)               int64: its position there; all positions before it are in the cache or in this call
//     out        (R, H D)
//
// depth is D rounded up to a multiple of 32, the rest 0. The keys and values of the N tokens are written to the cache before they are read.
// Arithmetic is in float32 for both types.
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

#include <cstring>
#include <limits>
#include <vector>

#include "common.h"

namespace {

using namespace gptbatch;
constexpr int64_t PAGE = 16;
constexpr int64_t PER_ROW = PAGE / LANES;  // vectors of one row of a page of keys
constexpr int QUERIES = 4;
constexpr int64_t CACHE_LINE = 64;
static_assert(PAGE % LANES == 0 && 32 % (2 * LANES) == 0);

// How many pages to score at once: enough sums side by side to hide the latency of one.
constexpr int pages_at_once(int queries) {
  return std::max<int>(1, std::min<int>(4, 4 / (queries * PER_ROW)));
}

#ifdef __AVX512BF16__
template <class T>
constexpr bool PAIRS = std::is_same_v<T, at::BFloat16>;
#else
template <class T>
constexpr bool PAIRS = false;
#endif

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

template <class T>
struct Sizes {
  int64_t head_size, depth, pages_stride, most_pages;
  float scale;
  const T* keys;        // of one head
  const T* values;      // of one head
  const int32_t* pages;  // of one slot
  const T* page_of_keys(int64_t i) const { return keys + pages[i] * depth * PAGE; }
  const T* page_of_values(int64_t i) const { return values + pages[i] * depth * PAGE; }
};

// scores[q][16 i + lane] = scale * (query q . key of that position), for the pages first to first + P - 1. Asks for their values.
template <class T, int Q, int P>
inline void score_pages(const Sizes<T>& s, const float* queries, int64_t first, float* scores, int64_t stride) {
  constexpr int64_t STEP = PAIRS<T> ? 4 : 2;
  const T* from[P];
  const char* ahead[P];
  UNROLL
  for (int p = 0; p < P; p++) {
    from[p] = s.page_of_keys(first + p);
    ahead[p] = reinterpret_cast<const char*>(s.page_of_values(first + p));
  }
  Vec sums[Q][P][PER_ROW][2];  // of even and of odd steps: one alone would wait for itself
  UNROLL
  for (int q = 0; q < Q; q++)
    UNROLL
    for (int p = 0; p < P; p++)
      UNROLL
      for (int64_t g = 0; g < PER_ROW; g++) sums[q][p][g][0] = sums[q][p][g][1] = Vec(0.0f);
  for (int64_t d = 0; d < s.depth; d += STEP) {
    UNROLL
    for (int p = 0; p < P; p++) {
      UNROLL
      for (int64_t i = 0; i < STEP * PAGE * static_cast<int64_t>(sizeof(T)); i += CACHE_LINE)
        __builtin_prefetch(ahead[p] + d * PAGE * static_cast<int64_t>(sizeof(T)) + i);
#ifdef __AVX512BF16__
      if constexpr (PAIRS<T>) {
        UNROLL
        for (int j = 0; j < 2; j++) {
          const __m512i key = _mm512_loadu_si512(from[p] + (d + 2 * j) * PAGE);
          UNROLL
          for (int q = 0; q < Q; q++) {
            int two;
            __builtin_memcpy(&two, reinterpret_cast<const T*>(queries) + q * s.depth + d + 2 * j, sizeof(two));
            const __m512i pair = _mm512_set1_epi32(two);
            sums[q][p][0][j] = _mm512_dpbf16_ps(sums[q][p][0][j], (__m512bh)pair, (__m512bh)key);
          }
        }
        continue;
      }
#endif
      Vec key[2 * PER_ROW];
      UNROLL
      for (int64_t j = 0; j < PER_ROW; j++) std::tie(key[2 * j], key[2 * j + 1]) = load_pair(from[p] + d * PAGE + 2 * j * LANES);
      UNROLL
      for (int q = 0; q < Q; q++)
        UNROLL
        for (int j = 0; j < 2; j++) {
          const Vec number(queries[q * s.depth + d + j]);
          UNROLL
          for (int64_t g = 0; g < PER_ROW; g++) sums[q][p][g][j] = at::vec::fmadd(number, key[j * PER_ROW + g], sums[q][p][g][j]);
        }
    }
  }
  const Vec scale(s.scale);
  UNROLL
  for (int q = 0; q < Q; q++)
    UNROLL
    for (int p = 0; p < P; p++)
      UNROLL
      for (int64_t g = 0; g < PER_ROW; g++)
        ((sums[q][p][g][0] + sums[q][p][g][1]) * scale).store(scores + q * stride + (first + p) * PAGE + g * LANES);
}

template <class T, int Q>
inline void score(const Sizes<T>& s, const float* queries, int64_t n_pages, float* scores, int64_t stride) {
  constexpr int P = pages_at_once(Q);
  int64_t page = 0;
  for (; page + P <= n_pages; page += P) score_pages<T, Q, P>(s, queries, page, scores, stride);
  if constexpr (P > 2)
    for (; page + 2 <= n_pages; page += 2) score_pages<T, Q, 2>(s, queries, page, scores, stride);
  for (; page < n_pages; page++) score_pages<T, Q, 1>(s, queries, page, scores, stride);
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

// out[q][d0 ...] = sum over keys of weight * value, for C pairs of vectors; query q sees first_count + q keys.
template <class T, int Q, int C>
inline void mix_columns(const Sizes<T>& s, const float* weights, int64_t stride, int64_t first_count, int64_t d0, float* out) {
  Vec sums[Q][2 * C];
  UNROLL
  for (int q = 0; q < Q; q++)
    UNROLL
    for (int c = 0; c < 2 * C; c++) sums[q][c] = Vec(0.0f);
  Vec value[2 * C];
  const auto load = [&](const T* row) {
    UNROLL
    for (int c = 0; c < C; c++) std::tie(value[2 * c], value[2 * c + 1]) = load_values(row + 2 * c * LANES);
  };
  for (int64_t k = 0; k < first_count;) {
    const T* row = s.page_of_values(k / PAGE) + d0;
    for (const int64_t end = std::min(first_count, k + PAGE); k < end; k++, row += s.depth) {
      load(row);
      UNROLL
      for (int q = 0; q < Q; q++) {
        const Vec weight(weights[q * stride + k]);
        UNROLL
        for (int c = 0; c < 2 * C; c++) sums[q][c] = at::vec::fmadd(weight, value[c], sums[q][c]);
      }
    }
  }
  for (int64_t k = first_count; k < first_count + Q - 1; k++) {  // keys that only the later queries see
    load(s.page_of_values(k / PAGE) + k % PAGE * s.depth + d0);
    UNROLL
    for (int q = static_cast<int>(k - first_count) + 1; q < Q; q++) {
      const Vec weight(weights[q * stride + k]);
      UNROLL
      for (int c = 0; c < 2 * C; c++) sums[q][c] = at::vec::fmadd(weight, value[c], sums[q][c]);
    }
  }
  UNROLL
  for (int q = 0; q < Q; q++)
    UNROLL
    for (int c = 0; c < C; c++) store_values<T>(sums[q][2 * c], sums[q][2 * c + 1], out + q * s.depth + d0 + 2 * c * LANES);
}

template <class T, int Q>
inline void mix(const Sizes<T>& s, const float* weights, int64_t stride, int64_t first_count, float* out) {
  int64_t d = 0;
  if constexpr (Q == 1) {  // read whole rows: a lone query waits for memory
    for (; d + 8 * LANES <= s.depth; d += 8 * LANES) mix_columns<T, Q, 4>(s, weights, stride, first_count, d, out);
    for (; d + 4 * LANES <= s.depth; d += 4 * LANES) mix_columns<T, Q, 2>(s, weights, stride, first_count, d, out);
  }
  for (; d < s.depth; d += 2 * LANES) mix_columns<T, Q, 1>(s, weights, stride, first_count, d, out);
}

// Q queries of one head at consecutive positions of one slot, the first of which sees first_count keys.
template <class T, int Q>
void attend_queries(const Sizes<T>& s, const T* q, int64_t q_stride, int64_t first_count, T* out, int64_t out_stride,
                    std::vector<float>& scratch) {
  const int64_t last_count = first_count + Q - 1, n_pages = (last_count + PAGE - 1) / PAGE, stride = n_pages * PAGE;
  scratch.resize(Q * (2 * s.depth + stride));
  float *queries = scratch.data(), *mixed = queries + Q * s.depth, *scores = mixed + Q * s.depth;
  using Query = std::conditional_t<PAIRS<T>, T, float>;
  for (int i = 0; i < Q; i++) {
    Query* query = reinterpret_cast<Query*>(queries) + i * s.depth;
    for (int64_t d = 0; d < s.head_size; d++) query[d] = static_cast<Query>(q[i * q_stride + d]);
    std::fill(query + s.head_size, query + s.depth, Query(0.0f));
  }
  score<T, Q>(s, queries, n_pages, scores, stride);
  float inverse[Q];
  for (int i = 0; i < Q; i++) inverse[i] = weigh(scores + i * stride, first_count + i);
  mix<T, Q>(s, scores, stride, first_count, mixed);
  for (int i = 0; i < Q; i++) {
    const Vec factor(inverse[i]);
    for (int64_t d = 0; d < s.head_size; d += 2 * LANES) {
      const float* from = mixed + i * s.depth + d;
      const Vec low = Vec::loadu(from) * factor, high = Vec::loadu(from + LANES) * factor;
      const int64_t count = std::min(2 * LANES, s.head_size - d);
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

template <class T>
void run(const at::Tensor& qkv, at::Tensor& keys, at::Tensor& values, const at::Tensor& pages, const at::Tensor& slots,
         const at::Tensor& positions, double scale, at::Tensor& out) {
  const int64_t tokens = slots.size(0), heads = keys.size(0), n_pages = keys.size(1), depth = keys.size(2);
  const int64_t width = out.size(1), head_size = width / heads, most = pages.size(1), head_stride = n_pages * depth * PAGE;
  const T* x = qkv.const_data_ptr<T>();
  T *k = keys.data_ptr<T>(), *v = values.data_ptr<T>(), *y = out.data_ptr<T>();
  const int32_t* table = pages.const_data_ptr<int32_t>();
  const int64_t *slot = slots.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();

  // writes what token t adds to the cache for head h
  const auto write = [&](int64_t t, int64_t h) {
    const int64_t page = table[slot[t] * most + position[t] / PAGE], place = position[t] % PAGE;
    const T *key = x + t * 3 * width + width + h * head_size, *value = key + width;
    T* to = k + h * head_stride + page * depth * PAGE;
    for (int64_t d = 0; d < head_size; d++) to[PAIRS<T> ? d / 2 * 2 * PAGE + place * 2 + d % 2 : d * PAGE + place] = key[d];
    std::memcpy(v + h * head_stride + (page * PAGE + place) * depth, value, head_size * sizeof(T));
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
    for (int64_t h = 0; h < heads; h++) write(early[i], h);
  });

  const int64_t n_tiles = static_cast<int64_t>(tiles.size());
  for_each(heads * n_tiles, 4, [&](int64_t i) {
    static thread_local std::vector<float> scratch;
    const auto [t, queries, alone] = tiles[i % n_tiles];
    const int64_t h = i / n_tiles;
    if (alone) write(t, h);
    const Sizes<T> sizes{head_size, depth, head_stride, most, static_cast<float>(scale), k + h * head_stride, v + h * head_stride,
                         table + slot[t] * most};
    const T* q = x + t * 3 * width + h * head_size;
    T* to = y + t * width + h * head_size;
    if (queries == QUERIES) {
      attend_queries<T, QUERIES>(sizes, q, 3 * width, position[t] + 1, to, width, scratch);
    } else {
      attend_queries<T, 1>(sizes, q, 3 * width, position[t] + 1, to, width, scratch);
    }
  });
  std::fill(y + tokens * width, y + out.numel(), T(0));
}

at::Tensor attend(const at::Tensor& qkv, at::Tensor keys, at::Tensor values, const at::Tensor& pages, const at::Tensor& slots,
                  const at::Tensor& positions, double scale) {
  TORCH_CHECK(qkv.dim() == 2 && keys.dim() == 4 && qkv.is_contiguous() && keys.is_contiguous() && values.is_contiguous() &&
                  pages.is_contiguous() && slots.is_contiguous() && positions.is_contiguous(),
              "attend: contiguous tensors are needed");
  TORCH_CHECK(keys.size(3) == PAGE && keys.size(2) % 32 == 0 && keys.numel() == values.numel() && slots.sizes() == positions.sizes() &&
                  slots.size(0) <= qkv.size(0) && qkv.size(1) % (3 * keys.size(0)) == 0 && qkv.size(1) / (3 * keys.size(0)) <= keys.size(2),
              "attend: the shapes do not fit each other");
  at::Tensor out = at::empty({qkv.size(0), qkv.size(1) / 3}, qkv.options());
  if (qkv.scalar_type() == at::kFloat) {
    run<float>(qkv, keys, values, pages, slots, positions, scale, out);
  } else {
    run<at::BFloat16>(qkv, keys, values, pages, slots, positions, scale, out);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def("attend(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor pages, Tensor slots, Tensor positions, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) { library.impl("attend", attend); }
