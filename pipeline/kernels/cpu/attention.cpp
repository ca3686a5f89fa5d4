// Causal attention over a paged KV cache (PagedAttention: Kwon et al. 2023), for a flat batch of
// tokens of many sequences.
//
//     paged_attention      queries, keys and values are given
//     qkv_paged_attention  computes them from x first, head by head
//
// Both write the keys and values of the batch to the cache before they are read. Arithmetic is in
// float32, or in exact integers (kv_blocks_int8.h).
//
// Batch invariance: the result of a query depends on its row, its position and the cache of its
// sequence. Up to four queries of one sequence share loads of KV blocks. That changes no reduction
// order. The compiler must not reorder or contract: -ffp-contract=off, no -ffast-math.
//
// qkv_paged_attention overlaps a GEMM, which is bound by computation, with attention, which is
// bound by memory. A thread takes heads one after the other. While it multiplies the rows of one
// head, it prefetches the KV blocks of the head that it took before into L2, and attends over them
// tile by tile. In a decode step, rows are few: the projected queries of a head are still cached
// when attention reads them. No barrier stands between projection and attention.

#include "attention_tiles.h"
#include "gemm.h"
#include "kv_blocks_full.h"
#include "kv_blocks_int8.h"
#include "threads.h"

namespace gptbatch {
namespace {

constexpr int64_t TILES_PER_GRAIN = 4;
// Lines of KV blocks to prefetch per GEMM step. More slow the GEMM down.
constexpr int LISTED_LINES_PER_STEP = 2;

template <class T, class Blocks>
void attend_all(const T* qkv, int64_t token_stride, int64_t part_stride, int64_t head_stride,
                const AttentionTiles<T, Blocks>& tiles) {
  const auto head = [&](int64_t h) {
    return HeadQkv<T>{qkv + h * head_stride, token_stride, part_stride};
  };
  const std::vector<int64_t>& shared = tiles.shared_tokens();
  parallel_for_each(static_cast<int64_t>(shared.size()), TILES_PER_GRAIN, [&](int64_t i) {
    for (int64_t h = 0; h < tiles.n_heads(); h++) tiles.write(shared[i], h, head(h));
  });
  const int64_t n_tiles = tiles.n_tiles();
  const int64_t grains = (n_tiles + TILES_PER_GRAIN - 1) / TILES_PER_GRAIN;
  parallel_for_each(tiles.n_heads() * grains, 1, [&](int64_t i) {
    const int64_t h = i / grains, from = i % grains * TILES_PER_GRAIN;
    const int64_t to = std::min(from + TILES_PER_GRAIN, n_tiles);
    BlockPrefetcher prefetcher = tiles.prefetcher(from, to, h);
    prefetcher.prefetch(MIN_PREFETCH_DISTANCE);
    tiles.attend(from, to, h, head(h), prefetcher);
  });
}

// One thread of qkv_paged_attention: takes heads one after the other.
template <class T, class Blocks>
class HeadWorker {
 public:
  HeadWorker(const T* x, int64_t in, const T* weights, const float* bias, int64_t panels_per_head,
             const AttentionTiles<T, Blocks>& attention)
      : x_(x),
        weights_(weights),
        bias_(bias),
        in_(in),
        panels_(panels_per_head),
        attention_(attention) {
    for (auto& buffer : buffers_.projected) buffer.resize(attention_.n_tokens() * panels_ * NR);
  }

  // Projects head h, and attends over the previous head meanwhile. next: the head that this thread
  // probably takes after h.
  void take(int64_t h, int64_t next) {
    T* const projected = buffers_.projected[turn_].data();
    const int64_t rows = attention_.n_tokens(), stride = panels_ * NR;
    const int64_t chunks = (rows + MAX_ROWS_PER_CHUNK - 1) / MAX_ROWS_PER_CHUNK;
    int64_t done = 0;  // rows times panels
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t first = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - first;
      const RowTiles<T> row_tiles(x_ + first * in_, count, in_);
      for (int64_t p = 0; p < panels_; p++) {
        const int64_t panel = h * panels_ + p;
        const int64_t next_panel =
            p + 1 < panels_ ? panel + 1 : (chunk + 1 < chunks ? h : next) * panels_;
        for (int64_t tile = 0; tile < row_tiles.count(); tile++) {
          const int64_t row = row_tiles.first_row(tile), begun = done;
          done += row_tiles.first_row(tile + 1) - row;
          const Epilogue<T> epilogue{bias_ + panel * NR,
                                     nullptr,
                                     projected + (first + row) * stride + p * NR,
                                     stride,
                                     NR,
                                     Activation::none};
          project_tile(row_tiles, tile, panel, next_panel, begun, done, epilogue);
        }
      }
    }
    gemm_.finish();
    previous_ = h;
    prefetcher_ = attention_.prefetcher(0, attention_.n_tiles(), h);
    prefetcher_.prefetch(MIN_PREFETCH_DISTANCE);
    head_ = HeadQkv<T>{projected, stride, stride / 3};
    turn_ = 1 - turn_;
    for (const int64_t token : attention_.shared_tokens()) attention_.write(token, h, head_);
  }

  // Attends over the last head.
  void finish() {
    if (previous_ < 0) return;
    for (int64_t from = 0; from < attention_.n_tiles(); from += TILES_PER_GRAIN) {
      const int64_t to = std::min(from + TILES_PER_GRAIN, attention_.n_tiles());
      attention_.attend(from, to, previous_, head_, prefetcher_);
    }
  }

 private:
  // Buffers that a thread keeps between calls.
  struct Buffers {
    std::vector<T> projected[2];  // of the current head and the previous one
    std::vector<const char*> lines;
  };

  static Buffers& buffers() {
    static thread_local Buffers of_thread;
    return of_thread;
  }

  // Multiplies one row tile by one panel, then attends over the previous head's share of attention
  // tiles. `begun` and `done`: rows times panels of this head before and after the row tile.
  void project_tile(const RowTiles<T>& row_tiles, int64_t row_tile, int64_t panel,
                    int64_t next_panel, int64_t begun, int64_t done, const Epilogue<T>& epilogue) {
    const T* weights = weights_ + panel * in_ * NR;
    const T* next_weights = weights_ + next_panel * in_ * NR;
    if (previous_ < 0) {
      row_tiles.template multiply<0>(row_tile, weights, next_weights, nullptr, epilogue, gemm_);
      return;
    }
    const int64_t all = attention_.n_tokens() * panels_;
    const int64_t from = attention_.n_tiles() * begun / all;
    const int64_t end = attention_.n_tiles() * done / all;
    const char* const* lines = list_lines(end, LISTED_LINES_PER_STEP * row_tiles.prefetch_steps());
    row_tiles.template multiply<LISTED_LINES_PER_STEP>(row_tile, weights, next_weights, lines,
                                                       epilogue, gemm_);
    attention_.attend(from, end, previous_, head_, prefetcher_);
  }

  // Exactly `count` lines to prefetch: those of the previous head before attention tile `end`, then
  // a line of x, which is cached.
  const char* const* list_lines(int64_t end, int64_t count) {
    buffers_.lines.resize(count);
    auto next = buffers_.lines.begin();
    prefetcher_.take(std::min(count, attention_.lines_before(end, prefetcher_)),
                     [&](const char* line) { *next++ = line; });
    std::fill(next, buffers_.lines.end(), reinterpret_cast<const char*>(x_));
    return buffers_.lines.data();
  }

  const T *x_, *weights_;
  const float* bias_;
  int64_t in_, panels_, previous_ = -1;
  const AttentionTiles<T, Blocks>& attention_;
  HeadQkv<T> head_{};           // of the previous head
  BlockPrefetcher prefetcher_;  // likewise
  int turn_ = 0;
  GemmThread<T, T> gemm_;
  Buffers& buffers_ = buffers();
};

template <class T, class Blocks>
void attend_by_head(const T* x, int64_t in, const T* packed, int64_t n_panels, const float* bias,
                    const AttentionTiles<T, Blocks>& attention) {
  const int64_t heads = attention.n_heads();
  const int64_t multiplications =
      attention.n_tokens() * in * n_panels * NR + attention.multiplications();
  const int64_t threads =
      multiplications < MIN_PARALLEL_MULTIPLICATIONS ? 1 : max_threads();
  std::atomic<int64_t> taken{0};
  on_threads(std::min(threads, heads), [&] {
    HeadWorker<T, Blocks> worker(x, in, packed, bias, n_panels / heads, attention);
    for (int64_t h; (h = taken.fetch_add(1)) < heads;)
      worker.take(h, std::min(h + threads, heads - 1));
    worker.finish();
  });
}

}  // namespace

int64_t kv_block_elements(bool is_int8, int64_t head_size) {
  const int64_t padded_size =
      (head_size + HEAD_SIZE_MULTIPLE - 1) / HEAD_SIZE_MULTIPLE * HEAD_SIZE_MULTIPLE;
  return is_int8 ? Int8BlocksBase::block_elements(padded_size)
                 : FullBlocks<float>::block_elements(padded_size);
}

template <class T>
void paged_attention(const T* qkv, int64_t token_stride, int64_t part_stride, int64_t head_stride,
                     const PagedTokens& tokens, T* out) {
  if (tokens.is_int8) {
    attend_all(qkv, token_stride, part_stride, head_stride,
               AttentionTiles<T, Int8Blocks<T>>(tokens, out));
  } else {
    attend_all(qkv, token_stride, part_stride, head_stride,
               AttentionTiles<T, FullBlocks<T>>(tokens, out));
  }
}

template <class T>
void qkv_paged_attention(const T* x, int64_t in, const T* packed, int64_t n_panels,
                         const float* bias, const PagedTokens& tokens, T* out) {
  if (tokens.is_int8) {
    attend_by_head(x, in, packed, n_panels, bias, AttentionTiles<T, Int8Blocks<T>>(tokens, out));
  } else {
    attend_by_head(x, in, packed, n_panels, bias, AttentionTiles<T, FullBlocks<T>>(tokens, out));
  }
}

template void paged_attention(const float*, int64_t, int64_t, int64_t, const PagedTokens&, float*);
template void paged_attention(const BFloat16*, int64_t, int64_t, int64_t, const PagedTokens&,
                              BFloat16*);
template void qkv_paged_attention(const float*, int64_t, const float*, int64_t, const float*,
                                  const PagedTokens&, float*);
#ifdef __AVX512BF16__
template void qkv_paged_attention(const BFloat16*, int64_t, const BFloat16*, int64_t, const float*,
                                  const PagedTokens&, BFloat16*);
#endif

}  // namespace gptbatch
