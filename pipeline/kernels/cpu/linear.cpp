// The linear layer: y = activation(x W^T + bias) + residual.
//
// The work is cut into items: one packed panel times one chunk of at most MAX_ROWS_PER_CHUNK rows.
// A panel is read from memory once per chunk. Meanwhile the thread prefetches the panel that it
// probably takes next into L2: the hardware prefetcher does not look that far ahead. At 64 rows the
// wait for weights would take a sixth of the time.
//
// Each element of y depends on its row of x only: gemm.h gives the order of its sum.

#include "gemm.h"
#include "threads.h"

namespace gptbatch {

int64_t panel_columns() { return NR; }

int64_t bfloat16_k_multiple() {
#ifdef __AMX_BF16__
  return AMX_K_STEP;
#else
  return AVX512_BF16_K_STEP;
#endif
}

template <class T>
void pack_weight(const T* weight, int64_t out, int64_t in, int64_t in_padded, T* packed) {
  constexpr int64_t K_ROWS = std::is_same_v<T, float> ? 1 : AVX512_BF16_K_STEP;
  parallel_for_each((out + NR - 1) / NR, 1, [&](int64_t panel) {
    T* to = packed + panel * in_padded * NR;
    for (int64_t c = 0; c < std::min(NR, out - panel * NR); c++)
      for (int64_t k = 0; k < in; k++)
        to[k / K_ROWS * K_ROWS * NR + c * K_ROWS + k % K_ROWS] =
            weight[(panel * NR + c) * in + k];
  });
}

template <class T, class Y>
void linear(const T* x, int64_t rows, int64_t in, const T* packed, int64_t out, const float* bias,
            const Y* residual, Activation activation, Y* y) {
  const int64_t panels = (out + NR - 1) / NR, panel_size = in * NR;
  // Chunks are of about equal size: a small one would wait for its weights.
  const int64_t chunks = (rows + MAX_ROWS_PER_CHUNK - 1) / MAX_ROWS_PER_CHUNK;
  const int64_t tile_rows = RowTiles<T>::max_rows();
  const int64_t chunk_rows = ((rows + chunks - 1) / chunks + tile_rows - 1) / tile_rows * tile_rows;
  const int64_t threads =
      rows * in * out < MIN_PARALLEL_MULTIPLICATIONS ? 1 : max_threads();
  const auto work = [&](int64_t item, GemmThread<T, Y>& thread) {
    const int64_t chunk = item / panels, panel = item % panels, column = panel * NR;
    const int64_t first = std::min(rows, chunk * chunk_rows);
    const int64_t last = std::min(rows, first + chunk_rows);
    const T* next_panel = packed + std::min(panel + threads, panels - 1) * panel_size;
    const RowTiles<T> tiles(x + first * in, last - first, in);
    for (int64_t tile = 0; tile < tiles.count(); tile++) {
      const int64_t offset = (first + tiles.first_row(tile)) * out + column;
      const Epilogue<Y> epilogue{bias == nullptr ? nullptr : bias + column,
                                 residual == nullptr ? nullptr : residual + offset,
                                 y + offset,
                                 out,
                                 std::min(NR, out - column),
                                 activation};
      tiles.template multiply<0>(tile, packed + panel * panel_size, next_panel, nullptr, epilogue,
                                 thread);
    }
  };
  std::atomic<int64_t> next{0};
  on_threads(std::min(threads, chunks * panels), [&] {
    GemmThread<T, Y> thread;
    for (int64_t item; (item = next.fetch_add(1)) < chunks * panels;) work(item, thread);
    thread.finish();
  });
}

template void pack_weight(const float*, int64_t, int64_t, int64_t, float*);
template void linear(const float*, int64_t, int64_t, const float*, int64_t, const float*,
                     const float*, Activation, float*);
#ifdef __AVX512BF16__
template void pack_weight(const BFloat16*, int64_t, int64_t, int64_t, BFloat16*);
template void linear(const BFloat16*, int64_t, int64_t, const BFloat16*, int64_t, const float*,
                     const BFloat16*, Activation, BFloat16*);
template void linear(const BFloat16*, int64_t, int64_t, const BFloat16*, int64_t, const float*,
                     const float*, Activation, float*);
#endif

}  // namespace gptbatch
