// Causal attention of flat tokens over a paged cache, each query's sum in one fixed order.
//
//     gptbatch::attend(qkv, cache, pages, slots, positions, scale) -> out
//
//     qkv        (R, 3 H D)     float32 or bfloat16; rows from N on belong to nobody and come back as 0
//     cache      (H, P, page)   of qkv's dtype, pages as full_pages.h has them, or uint8, as int8_pages.h does
//     pages      (slots, most)  int32: which page holds the first positions of a slot, the next, ...
//     slots      (N,)           int64: the slot of each token
//     positions  (N,)           int64: its position there; all positions before it are in the cache or in this call
//     out        (R, H D)
//
// The keys and values of the N tokens are written to the cache before they are read. Arithmetic is in float32, or exact.
//
// What a query gets depends on its own row, its position and the cache of its slot, and on nothing else. Queries of one sequence are
// taken up to four at a time, which shares loads and changes no sum.
// The compiler must not contract or reorder: -ffp-contract=off, never -ffast-math.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention.h"
#include "full_pages.h"
#include "int8_pages.h"

namespace {

using namespace gptbatch;
constexpr int64_t FEW = 4;  // tiles that a thread takes at a time
thread_local Scratch scratch;
thread_local std::vector<float> mixed;

template <class T, class Pages>
void run(const at::Tensor& qkv, at::Tensor& cache, const at::Tensor& pages, const at::Tensor& slots, const at::Tensor& positions,
         double scale, int64_t depth, at::Tensor& out) {
  const int64_t tokens = slots.size(0), heads = cache.size(0), head_stride = cache.size(1) * cache.size(2), most = pages.size(1);
  const int64_t width = out.size(1), head_size = width / heads;
  TORCH_CHECK(cache.size(2) == Pages::page_numbers(depth), "attend: the pages of the cache are of another size");
  const T* x = qkv.const_data_ptr<T>();
  auto* numbers = cache.data_ptr<typename Pages::Number>();
  T* y = out.data_ptr<T>();
  const int32_t* table = pages.const_data_ptr<int32_t>();
  const int64_t *slot = slots.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  const auto pages_of = [&](int64_t t, int64_t h) { return Pages(depth, table + slot[t] * most, numbers + h * head_stride); };

  // writes what token t adds to the cache for head h
  const auto add = [&](int64_t t, int64_t h) {
    const T* key = x + t * 3 * width + width + h * head_size;
    pages_of(t, h).write(position[t], key, key + width, head_size, scratch);
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
    const bool unfinished = position[t] % Pages::SIZE != Pages::SIZE - 1;
    const bool alone = n == 1 && unfinished && (t == 0 || slot[t - 1] != slot[t]) && (t + 1 == tokens || slot[t + 1] != slot[t]);
    tiles.push_back({t, n, alone});
    t += n;
  }
  // what others read is written first; a token that is alone writes when it is its turn, and finds it in the CPU's cache
  std::vector<int64_t> early;
  for (const Tile& tile : tiles)
    if (!tile.alone)
      for (int64_t i = 0; i < tile.queries; i++) early.push_back(tile.token + i);
  for_each(static_cast<int64_t>(early.size()), FEW, [&](int64_t i) {
    for (int64_t h = 0; h < heads; h++) add(early[i], h);
  });

  const auto attend = [&]<int Q>(std::integral_constant<int, Q>, int64_t t, int64_t h, const void* next) {
    mixed.resize(Q * depth);
    float totals[Q];
    const T* query = x + t * 3 * width + h * head_size;
    pages_of(t, h).template attend<Q>(query, 3 * width, head_size, static_cast<float>(scale), position[t] + 1, next, mixed.data(), totals,
                                      scratch);
    for (int i = 0; i < Q; i++) {
      const Vec factor(1.0f / totals[i]);
      for (int64_t d = 0; d < head_size; d += 2 * LANES) {
        const float* from = mixed.data() + i * depth + d;
        const Vec low = Vec::loadu(from) * factor, high = Vec::loadu(from + LANES) * factor;
        const int64_t count = std::min(2 * LANES, head_size - d);
        T* to = y + (t + i) * width + h * head_size + d;
        if constexpr (std::is_same_v<T, float>) {
          low.store(to, std::min(LANES, count));
          if (count > LANES) high.store(to + LANES, count - LANES);
        } else {
          at::vec::convert_from_float<T>(low, high).store(to, count);
        }
      }
    }
  };
  const int64_t n_tiles = static_cast<int64_t>(tiles.size());
  for_each(heads * n_tiles, FEW, [&](int64_t i) {
    const auto [t, queries, alone] = tiles[i % n_tiles];
    const int64_t h = i / n_tiles, after = i + 1;
    // what the same thread reads next
    const bool mine = after % FEW != 0 && after < heads * n_tiles;
    const void* next = mine ? pages_of(tiles[after % n_tiles].token, after / n_tiles).first_page() : nullptr;
    if (alone) add(t, h);
    if (queries == QUERIES) {
      attend(std::integral_constant<int, QUERIES>(), t, h, next);
    } else {
      attend(std::integral_constant<int, 1>(), t, h, next);
    }
  });
  std::fill(y + tokens * width, y + out.numel(), T(0));
}

at::Tensor attend(const at::Tensor& qkv, at::Tensor cache, const at::Tensor& pages, const at::Tensor& slots, const at::Tensor& positions,
                  double scale) {
  TORCH_CHECK(qkv.dim() == 2 && cache.dim() == 3 && qkv.is_contiguous() && cache.is_contiguous() && pages.is_contiguous() &&
                  slots.is_contiguous() && positions.is_contiguous(),
              "attend: contiguous tensors are needed");
  const bool whole = cache.scalar_type() == at::kByte;
  const int64_t head_size = qkv.size(1) / (3 * cache.size(0)), depth = (head_size + 31) / 32 * 32;
  TORCH_CHECK(qkv.size(1) == 3 * cache.size(0) * head_size && slots.sizes() == positions.sizes() && slots.size(0) <= qkv.size(0),
              "attend: the shapes do not fit each other");
  TORCH_CHECK(whole || cache.scalar_type() == qkv.scalar_type(), "attend: the cache is of the type of qkv, or uint8");
  at::Tensor out = at::empty({qkv.size(0), qkv.size(1) / 3}, qkv.options());
  const auto with = [&](auto number) {
    using T = decltype(number);
    const auto run_over = whole ? run<T, Int8Pages<T>> : run<T, FullPages<T>>;
    run_over(qkv, cache, pages, slots, positions, scale, depth, out);
  };
  qkv.scalar_type() == at::kFloat ? with(float()) : with(at::BFloat16());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def("attend(Tensor qkv, Tensor(a!) cache, Tensor pages, Tensor slots, Tensor positions, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) { library.impl("attend", attend); }
