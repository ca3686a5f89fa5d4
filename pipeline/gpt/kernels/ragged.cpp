// Causal attention of flat tokens over a paged cache, each query's sum in one fixed order.
//
//     gptbatch::attend(qkv, keys, values, pages, slots, positions, scale) -> out
//
//     qkv        (R, 3 H D)         float32 or bfloat16; rows from N on belong to nobody and come back as 0
//     keys       (H, P, depth, 16)  the keys of 16 positions a page, one number of each side by side
//     values     (H, P, 16, depth)  the values of the same positions
//     pages      (slots, most)      int32: which page holds positions 16 i to 16 i + 15 of a slot
//     slots      (N,)               int64: the slot of each token
//     positions  (N,)               int64: its position there; all positions before it are in the cache or in this call
//     out        (R, H D)
//
// depth is D rounded up to a multiple of 32, the rest 0. The keys and values of the N tokens are written to the cache first.
// Arithmetic is in float32 for both types.
//
// What a query gets depends on its own row, its position and the cache of its slot, and on nothing else:
//   a score is a sum over d = 0, 1, 2, ... by fused multiply-add;
//   the weights are exp(score - largest score), their total a sum lane by lane, key by key, then over the lanes;
//   an output is a sum over keys 0, 1, 2, ... by fused multiply-add, then one product with 1 / total.
// Queries of one sequence are taken up to four at a time and pages several at a time, which shares loads and changes no sum.
// The compiler must not contract or reorder: -ffp-contract=off, never -ffast-math.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

// Sums stay in registers only where the compiler unrolls the short loops around them, which it does not do by itself.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t PAGE = 16;
constexpr int64_t LANES = Vec::size();
constexpr int64_t PER_ROW = PAGE / LANES;  // vectors of one row of a page of keys
constexpr int QUERIES = 4;
static_assert(PAGE % LANES == 0 && 32 % (2 * LANES) == 0);

// How many pages to score at once: enough sums side by side to hide the latency of one.
constexpr int pages_at_once(int queries) {
  return std::max<int>(1, std::min<int>(4, 8 / (queries * PER_ROW)));
}

// 2 * LANES numbers as float32.
template <class T>
inline std::tuple<Vec, Vec> load_pair(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(from), Vec::loadu(from + LANES)};
  } else {
    return at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  }
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

// scores[q][16 i + lane] = scale * (query q . key of that position), for the pages first to first + P - 1.
template <class T, int Q, int P>
inline void score_pages(const Sizes<T>& s, const float* queries, int64_t first, float* scores, int64_t stride) {
  const T* from[P];
  UNROLL
  for (int p = 0; p < P; p++) from[p] = s.page_of_keys(first + p);
  Vec sums[Q][P][PER_ROW];
  UNROLL
  for (int q = 0; q < Q; q++)
    UNROLL
    for (int p = 0; p < P; p++)
      UNROLL
      for (int64_t g = 0; g < PER_ROW; g++) sums[q][p][g] = Vec(0.0f);
  for (int64_t d = 0; d < s.depth; d += 2) {
    UNROLL
    for (int p = 0; p < P; p++) {
      Vec key[2 * PER_ROW];
      UNROLL
      for (int64_t j = 0; j < PER_ROW; j++) std::tie(key[2 * j], key[2 * j + 1]) = load_pair(from[p] + d * PAGE + 2 * j * LANES);
      UNROLL
      for (int q = 0; q < Q; q++) {
        const Vec even(queries[q * s.depth + d]), odd(queries[q * s.depth + d + 1]);
        UNROLL
        for (int64_t g = 0; g < PER_ROW; g++) sums[q][p][g] = at::vec::fmadd(even, key[g], sums[q][p][g]);
        UNROLL
        for (int64_t g = 0; g < PER_ROW; g++) sums[q][p][g] = at::vec::fmadd(odd, key[PER_ROW + g], sums[q][p][g]);
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
        (sums[q][p][g] * scale).store(scores + q * stride + (first + p) * PAGE + g * LANES);
}

template <class T, int Q>
inline void score(const Sizes<T>& s, const float* queries, int64_t n_pages, float* scores, int64_t stride) {
  constexpr int P = pages_at_once(Q);
  int64_t page = 0;
  for (; page + P <= n_pages; page += P) score_pages<T, Q, P>(s, queries, page, scores, stride);
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
    for (int c = 0; c < C; c++) std::tie(value[2 * c], value[2 * c + 1]) = load_pair(row + 2 * c * LANES);
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
    for (int c = 0; c < 2 * C; c++) sums[q][c].store(out + q * s.depth + d0 + c * LANES);
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
  for (int i = 0; i < Q; i++) {
    for (int64_t d = 0; d < s.head_size; d++) queries[i * s.depth + d] = static_cast<float>(q[i * q_stride + d]);
    std::fill(queries + i * s.depth + s.head_size, queries + (i + 1) * s.depth, 0.0f);
  }
  score<T, Q>(s, queries, n_pages, scores, stride);
  float inverse[Q];
  for (int i = 0; i < Q; i++) inverse[i] = weigh(scores + i * stride, first_count + i);
  mix<T, Q>(s, scores, stride, first_count, mixed);
  for (int i = 0; i < Q; i++)
    for (int64_t d = 0; d < s.head_size; d++) out[i * out_stride + d] = static_cast<T>(mixed[i * s.depth + d] * inverse[i]);
}

// Calls work(i) for i from 0 to count - 1, on all threads, each taking the next few when it is done with its last.
template <class F>
void for_each(int64_t count, int64_t few, const F& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), (count + few - 1) / few), 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(few)) < count;)
      for (int64_t i = first; i < std::min(first + few, count); i++) work(i);
  });
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

  for_each(tokens, 16, [&](int64_t t) {
    const int64_t page = table[slot[t] * most + position[t] / PAGE], place = position[t] % PAGE;
    for (int64_t h = 0; h < heads; h++) {
      const T *key = x + t * 3 * width + width + h * head_size, *value = key + width;
      T* to = k + h * head_stride + page * depth * PAGE + place;
      for (int64_t d = 0; d < head_size; d++) to[d * PAGE] = key[d];
      std::memcpy(v + h * head_stride + (page * PAGE + place) * depth, value, head_size * sizeof(T));
    }
  });

  struct Tile {
    int64_t token, queries;
  };
  std::vector<Tile> tiles;  // up to QUERIES tokens at consecutive positions of one slot
  for (int64_t t = 0; t < tokens;) {
    int64_t n = 1;
    while (n < QUERIES && t + n < tokens && slot[t + n] == slot[t] && position[t + n] == position[t] + n) n++;
    n = n == QUERIES ? n : 1;
    tiles.push_back({t, n});
    t += n;
  }
  const int64_t n_tiles = static_cast<int64_t>(tiles.size());
  for_each(heads * n_tiles, 4, [&](int64_t i) {
    static thread_local std::vector<float> scratch;
    const auto [t, queries] = tiles[i % n_tiles];
    const int64_t h = i / n_tiles;
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
