// GEMM with a packed weight: row tiles of x times panels of W^T. MR, NR and micro-kernel are as in
// BLIS; K is not blocked, and x is not packed.
//
//     x      (rows, in)  float32 or bfloat16
//     panel  (in, NR)    NR columns of W^T; in bfloat16 (in / 2, NR, 2), two rows interleaved
//
// The reduction order of a sum is fixed: k = 0, 1, 2, ... by fused multiply-add into one float32.
// It depends neither on the number of rows nor on the tile. NR is in epilogue.h. Naive code that
// computes the same:
//
//     for (r = 0; r < rows; r++)
//       for (c = 0; c < NR; c++) {
//         float sum = 0;
//         for (k = 0; k < in; k++) sum = fma(x[r][k], panel[k][c], sum);
//         y[r][c] = epilogue(sum);
//       }
//
// gemm_avx512_bf16.h and gemm_amx.h compute in bfloat16. Each describes its own reduction order.

#pragma once

#include "epilogue.h"

namespace gptbatch {

// Row tile height: MR * PANEL_VECTORS sums, PANEL_VECTORS weights and one input fit the registers.
constexpr int MR = LANES == 16 ? 8 : 4;
// Rows of x that stay in the cache while all panels pass.
constexpr int64_t MAX_ROWS_PER_CHUNK = 256;
// With fewer multiplications, waking other threads costs more than it saves.
constexpr int64_t MIN_PARALLEL_MULTIPLICATIONS = 1 << 18;

// One K step of a sum.
template <class T>
struct GemmStep;

template <>
struct GemmStep<float> {
  static constexpr int64_t K_STEP = 1;
  static Vec load(const float* weights) { return gptbatch::load(weights); }
  static Vec broadcast(const float* x) { return gptbatch::broadcast(*x); }
  static Vec add(Vec x, Vec weights, Vec sum) {
    return multiply_add(x, weights, sum);
  }
};

}  // namespace gptbatch

#include "gemm_avx512_bf16.h"

namespace gptbatch {

// Prefetches into L2 during a GEMM: per step one line of a contiguous range, and LISTED_PER_STEP
// lines of a list.
template <int LISTED_PER_STEP>
struct GemmPrefetch {
  const char* line;
  const char* const* listed;

  void step() {
    __builtin_prefetch(line, 0, 2);
    line += CACHE_LINE_BYTES;
    UNROLL
    for (int i = 0; i < LISTED_PER_STEP; i++) __builtin_prefetch(listed[i], 0, 2);
    listed += LISTED_PER_STEP;
  }
};

// Micro-kernel: M rows of x times one panel. M is 1 to MR.
//
// Register map, with AVX2 (16 registers, M = 4) and AVX-512 (32 registers, M = 8):
//
//              panel vector 0   panel vector 1   panel vector 2
//     row r    sums[r][0]       sums[r][1]       sums[r][2]       12 or 24 registers
//              weights[0]       weights[1]       weights[2]       3 registers
//     input    x[r][k] in all lanes                               1 register
//
// noinline: inlined into a larger function, GCC spills the sums.
template <class T, int M, class P, class Y>
__attribute__((noinline)) void gemm_tile(const T* x, int64_t in, const T* panel, P prefetch,
                                         const Epilogue<Y>& epilogue) {
  using Step = GemmStep<T>;
  Vec sums[M][PANEL_VECTORS] = {};
  for (int64_t k = 0; k < in; k += Step::K_STEP, panel += NR * Step::K_STEP) {
    prefetch.step();
    decltype(Step::load(panel)) weights[PANEL_VECTORS];
    UNROLL
    for (int v = 0; v < PANEL_VECTORS; v++)
      weights[v] = Step::load(panel + v * LANES * Step::K_STEP);
    UNROLL
    for (int r = 0; r < M; r++) {
      const auto input = Step::broadcast(x + r * in + k);
      UNROLL
      for (int v = 0; v < PANEL_VECTORS; v++) sums[r][v] = Step::add(input, weights[v], sums[r][v]);
    }
  }
  if (epilogue.columns == NR) {
    epilogue.template finish_tile<true>(sums);
  } else {
    epilogue.template finish_tile<false>(sums);
  }
}

// 1 to MR rows of x times one panel.
template <class T, int M = MR, class P, class Y>
inline void gemm_rows(int64_t rows, const T* x, int64_t in, const T* panel, P prefetch,
                      const Epilogue<Y>& epilogue) {
  if constexpr (M > 1) {
    if (rows < M) return gemm_rows<T, M - 1>(rows, x, in, panel, prefetch, epilogue);
  }
  gemm_tile<T, M>(x, in, panel, prefetch, epilogue);
}

}  // namespace gptbatch

#include "gemm_amx.h"

namespace gptbatch {

// What a thread keeps from one tile to the next. finish() completes the last tile.
template <class T, class Y>
struct GemmThread {
  void finish() {}
};
#ifdef __AMX_BF16__
template <class Y>
struct GemmThread<BFloat16, Y> : AmxGemm<Y> {};
#endif

// Rows of x, cut into row tiles of about equal height: a short last tile would waste registers.
template <class T>
class RowTiles {
 public:
  RowTiles(const T* x, int64_t rows, int64_t in) : x_(x), rows_(rows), in_(in) {
    const int64_t panel_lines = in * NR * static_cast<int64_t>(sizeof(T)) / CACHE_LINE_BYTES;
    count_ = (rows + max_rows() - 1) / max_rows();
    amx_height_ = ((rows + count_ - 1) / count_ + 1) / 2;
    k_steps_ = in / (uses_amx<T>() ? AMX_K_STEP : GemmStep<T>::K_STEP);
    lines_per_tile_ = (panel_lines + count_ - 1) / count_;
    prefetches_per_step_ = uses_amx<T>() ? (lines_per_tile_ + k_steps_ - 1) / k_steps_ : 1;
  }

  int64_t count() const { return count_; }
  static int64_t max_rows() { return uses_amx<T>() ? 2 * AMX_MAX_ROWS : MR; }
  int64_t first_row(int64_t tile) const { return rows_ * tile / count_; }
  // Steps of GemmPrefetch per tile.
  int64_t prefetch_steps() const { return k_steps_ * prefetches_per_step_; }

  // Multiplies a tile by a panel. Prefetches the tile's share of `next_panel`, and
  // LISTED_PER_STEP * prefetch_steps() lines of a list. Without AMX, a tile prefetches one line per
  // K step. A tile with more lines than K steps leaves some of them out; a tile with fewer goes on
  // into the share of the next tile.
  template <int LISTED_PER_STEP, class Y>
  void multiply(int64_t tile, const T* panel, const T* next_panel, const char* const* listed,
                const Epilogue<Y>& epilogue, GemmThread<T, Y>& thread) const {
    const int64_t row = first_row(tile), rows = first_row(tile + 1) - row;
    const int64_t first_line = tile * std::min(lines_per_tile_, prefetch_steps());
    const GemmPrefetch<LISTED_PER_STEP> prefetch{
        reinterpret_cast<const char*>(next_panel) + first_line * CACHE_LINE_BYTES, listed};
    const T* x = x_ + row * in_;
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (uses_amx<T>())
        return thread.multiply(rows, amx_height_, x, in_, panel, prefetch, prefetches_per_step_,
                               epilogue);
    }
#endif
    gemm_rows<T>(rows, x, in_, panel, prefetch, epilogue);
  }

 private:
  const T* x_;
  int64_t rows_, in_, count_, k_steps_, lines_per_tile_, prefetches_per_step_;
  // Rows of each of the two AMX tiles: the same for all row tiles, which saves configurations.
  int64_t amx_height_;
};

}  // namespace gptbatch
