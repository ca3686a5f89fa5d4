// Causal attention of flat tokens over a paged cache, each query's sum in one fixed order.
//
//     gptbatch::paged_attention(qkv, cache, pages, slots, positions, scale) -> out
//     gptbatch::qkv_paged_attention(x, packed, bias, cache, pages, slots, positions, scale) -> out
//
//     qkv        (R, 3, H, D)   float32 or bfloat16, the last dimension contiguous; rows from N on belong to nobody and come back as 0
//     x          (R, C)         qkv is linear(x, packed, bias)
//     packed                    as linear.cpp has it, of 3 H D columns in the order (H, 3, D): a head takes whole panels
//     bias       (3 H D,)       float32
//     cache      (H, P, page)   of qkv's dtype, pages as kv_blocks_full.h has them, or uint8, as kv_blocks_int8.h does
//     pages      (slots, most)  int32: which page holds the first positions of a slot, the next, ...
//     slots      (N,)           int64: the slot of each token
//     positions  (N,)           int64: its position there; all positions before it are in the cache or in this call
//     out        (R, H D)
//
// The keys and values of the N tokens are written to the cache before they are read. Arithmetic is in float32, or exact.
//
// What a query gets depends on its own row, its position and the cache of its slot, and on nothing else. Queries of one sequence are
// taken up to four at a time, which shares loads and changes no sum.
//
// Attention waits for memory, products do not. So `qkv_paged_attention` goes head by head: while a thread multiplies the rows of one
// head, it asks for the pages of the head before, and attends to these a few at a time, when they have come into its own cache; it goes on
// asking meanwhile, for what follows, so that memory is seldom idle. Queries stay in that cache, too, where rows are as few as in a decode
// step, and no thread waits for another between the two.
// The compiler must not contract or reorder: -ffp-contract=off, never -ffast-math.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "kv_blocks_full.h"
#include "kv_blocks_int8.h"
#include "gemm.h"
#include "tokens.h"

namespace {

using namespace gptbatch;
constexpr int64_t FEW = 4;  // tiles that a thread takes at a time
constexpr int LISTED = 2;   // lines of pages that are asked for at each step of a product: more slow it down

template <class T, class Pages>
void run(const at::Tensor& qkv, const Tokens<T, Pages>& tokens) {
  const T* numbers = qkv.const_data_ptr<T>();
  const auto head = [&](int64_t h) { return Head<T>{numbers + h * qkv.stride(2), qkv.stride(0), qkv.stride(1)}; };
  const std::vector<int64_t>& early = tokens.early();
  for_each(static_cast<int64_t>(early.size()), FEW, [&](int64_t i) {
    for (int64_t h = 0; h < tokens.heads(); h++) tokens.write(early[i], h, head(h));
  });
  const int64_t tiles = tokens.tiles(), shares = (tiles + FEW - 1) / FEW;
  for_each(tokens.heads() * shares, 1, [&](int64_t i) {
    const int64_t h = i / shares, from = i % shares * FEW, to = std::min(from + FEW, tiles);
    Lookahead ahead = tokens.lookahead(from, to, h);
    ahead.ask(LEAD);
    tokens.attend(from, to, h, head(h), ahead);
  });
}

// What a thread does with its heads, one after the other.
template <class T, class Pages>
class Worker {
 public:
  Worker(const T* x, int64_t in, const T* weights, const float* bias, int64_t panels, const Tokens<T, Pages>& tokens)
      : x_(x), weights_(weights), bias_(bias), in_(in), panels_(panels), tokens_(tokens) {
    for (auto& some : kept_.projected) some.resize(tokens.count() * panels * COLUMNS);
  }

  // Makes head h's queries, keys and values, and attends to the head before. next: the head that is likely to come after h.
  void take(int64_t h, int64_t next) {
    T* const numbers = kept_.projected[turn_].data();
    const int64_t rows = tokens_.count(), chunks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, stride = panels_ * COLUMNS;
    int64_t done = 0;  // rows times panels
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t first = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - first;
      const Tiles<T> tiles(x_ + first * in_, count, in_);
      for (int64_t p = 0; p < panels_; p++) {
        const int64_t panel = h * panels_ + p, after = p + 1 < panels_ ? panel + 1 : (chunk + 1 < chunks ? h : next) * panels_;
        for (int64_t tile = 0; tile < tiles.count(); tile++) {
          const int64_t row = tiles.first_row(tile), begun = done;
          done += tiles.first_row(tile + 1) - row;
          const Ending<T> ending{bias_ + panel * COLUMNS, nullptr, numbers + (first + row) * stride + p * COLUMNS, stride, COLUMNS,
                                 Activation::none};
          const T *weights = weights_ + panel * in_ * COLUMNS, *then = weights_ + after * in_ * COLUMNS;
          if (before_ < 0) {
            tiles.template multiply<0>(tile, weights, then, nullptr, ending);
            continue;
          }
          const int64_t all = rows * panels_, from = tokens_.tiles() * begun / all, to = tokens_.tiles() * done / all;
          tiles.template multiply<LISTED>(tile, weights, then, list(to, LISTED * tiles.asks()), ending);
          tokens_.attend(from, to, before_, head_, ahead_);
        }
      }
    }
    before_ = h;
    ahead_ = tokens_.lookahead(0, tokens_.tiles(), h);
    ahead_.ask(LEAD);
    head_ = Head<T>{numbers, stride, stride / 3};
    turn_ = 1 - turn_;
    for (const int64_t token : tokens_.early()) tokens_.write(token, h, head_);
  }

  // Attends to the last head.
  void finish() {
    if (before_ < 0) return;
    for (int64_t from = 0; from < tokens_.tiles(); from += FEW)
      tokens_.attend(from, std::min(from + FEW, tokens_.tiles()), before_, head_, ahead_);
  }

 private:
  // Room that a thread keeps from one call to the next.
  struct Kept {
    std::vector<T> projected[2];  // of one head and the one before
    std::vector<const char*> lines;
  };

  // The next `count` lines of the head before, or as many as are to be asked for before tile `to`, and then some other that is near.
  const char* const* list(int64_t to, int64_t count) {
    kept_.lines.resize(count);
    auto listed = kept_.lines.begin();
    ahead_.next(std::min(count, tokens_.lines_before(to, ahead_)), [&](const char* line) { *listed++ = line; });
    std::fill(listed, kept_.lines.end(), reinterpret_cast<const char*>(x_));
    return kept_.lines.data();
  }

  static Kept& kept() {
    static thread_local Kept of_thread;
    return of_thread;
  }

  const T *x_, *weights_;
  const float* bias_;
  int64_t in_, panels_, before_ = -1;
  const Tokens<T, Pages>& tokens_;
  Head<T> head_{};   // of before_
  Lookahead ahead_;  // likewise
  int turn_ = 0;
  Kept& kept_ = kept();
};

template <class T, class Pages>
void run_by_head(const at::Tensor& x, const at::Tensor& packed, const float* bias, const Tokens<T, Pages>& tokens) {
  const int64_t heads = tokens.heads(), in = x.size(1);
  const int64_t multiplications = tokens.count() * in * packed.size(0) * COLUMNS + tokens.multiplications();
  const int64_t threads = multiplications < SMALL ? 1 : at::get_num_threads();
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, std::min(threads, heads), 1, [&](int64_t, int64_t) {
    Worker<T, Pages> worker(x.const_data_ptr<T>(), in, packed.const_data_ptr<T>(), bias, packed.size(0) / heads, tokens);
    for (int64_t h; (h = taken.fetch_add(1)) < heads;) worker.take(h, std::min(h + threads, heads - 1));
    worker.finish();
  });
}

// Calls work(T(), Tokens<T, Pages>) for the types of x and the cache.
template <class F>
void with_tokens(const at::Tensor& x, at::Tensor& cache, const at::Tensor& pages, const at::Tensor& slots, const at::Tensor& positions,
                 double scale, at::Tensor& out, const F& work) {
  const bool whole = cache.scalar_type() == at::kByte;
  TORCH_CHECK(cache.dim() == 3 && cache.is_contiguous() && pages.is_contiguous() && slots.is_contiguous() && positions.is_contiguous(),
              "paged_attention: contiguous tensors are needed");
  TORCH_CHECK(slots.sizes() == positions.sizes() && slots.size(0) <= x.size(0), "paged_attention: the shapes do not fit each other");
  TORCH_CHECK(whole || cache.scalar_type() == x.scalar_type(), "paged_attention: the cache is of the type of qkv, or uint8");
  const auto with = [&](auto number) {
    using T = decltype(number);
    if (whole) {
      work(number, Tokens<T, Int8Pages<T>>(cache, pages, slots, positions, scale, out));
    } else {
      work(number, Tokens<T, FullPages<T>>(cache, pages, slots, positions, scale, out));
    }
  };
  x.scalar_type() == at::kFloat ? with(float()) : with(at::BFloat16());
}

at::Tensor paged_attention(const at::Tensor& qkv, at::Tensor cache, const at::Tensor& pages, const at::Tensor& slots, const at::Tensor& positions,
                  double scale) {
  TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3 && qkv.size(2) == cache.size(0) && qkv.stride(3) == 1, "paged_attention: qkv is to be (R, 3, H, D)");
  at::Tensor out = at::empty({qkv.size(0), qkv.size(2) * qkv.size(3)}, qkv.options());
  with_tokens(qkv, cache, pages, slots, positions, scale, out, [&](auto, const auto& tokens) { run(qkv, tokens); });
  return out;
}

at::Tensor qkv_paged_attention(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias, at::Tensor cache, const at::Tensor& pages,
                              const at::Tensor& slots, const at::Tensor& positions, double scale) {
  const int64_t columns = bias.numel(), heads = cache.size(0);
  TORCH_CHECK(bias.scalar_type() == at::kFloat && bias.is_contiguous(), "qkv_paged_attention: bias");
  TORCH_CHECK(heads > 0 && columns % (heads * COLUMNS) == 0, "qkv_paged_attention: a head takes whole panels");
  const at::Tensor inputs = fitting(x, packed, columns);
  at::Tensor out = at::empty({x.size(0), columns / 3}, x.options());
  with_tokens(inputs, cache, pages, slots, positions, scale, out, [&](auto number, const auto& tokens) {
    using T = decltype(number);
    if constexpr (std::is_same_v<T, float> || HAS_BFLOAT16) run_by_head(inputs, packed, bias.const_data_ptr<float>(), tokens);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def("paged_attention(Tensor qkv, Tensor(a!) cache, Tensor pages, Tensor slots, Tensor positions, float scale) -> Tensor");
  library.def(
      "qkv_paged_attention(Tensor x, Tensor packed, Tensor bias, Tensor(a!) cache, Tensor pages, Tensor slots, Tensor positions, float scale) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) {
  library.impl("paged_attention", paged_attention);
  library.impl("qkv_paged_attention", qkv_paged_attention);
}
