// The GEMM's tile in bfloat16, by the matrix product of AMX.
//
//     for (k = 0; k < in; k += 32)  // one tdpbf16ps
//       even = odd = 0;
//       for (pair = 0; pair < 16; pair++) {
//         even = fma(x[r][k + 2 pair], panel[k + 2 pair][c], even);
//         odd = fma(x[r][k + 2 pair + 1], panel[k + 2 pair + 1][c], odd);
//       }
//       sum[r][c] += even + odd;
//
// Intel's manual defines tdpbf16ps so: in float32, each step is rounded to nearest even, and
// subnormals count as 0. Each element of a tile is a dot product of its own, of a row of x and a
// column of the panel, and K steps follow in ascending order. The bits of a row therefore depend
// neither on the number of rows nor on its place in the tile.

#pragma once

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "epilogue.h"

namespace gptbatch {

constexpr int64_t AMX_MAX_ROWS = 16, AMX_ROW_BYTES = 64;  // the capacity of a tile register
constexpr int64_t AMX_K_STEP = 32;

#ifdef __AMX_BF16__
// Requests the use of AMX tile data, once per process. False if the system refuses.
inline bool request_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool granted =
      syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return granted;
}

// Multiplies tile by tile in one thread. The sums of a tile wait for the next tile: the vector units
// compute their epilogue while the matrix unit multiplies. finish() computes that of the last tile.
template <class Y>
class AmxGemm {
 public:
  AmxGemm() = default;
  AmxGemm(const AmxGemm&) = delete;
  AmxGemm& operator=(const AmxGemm&) = delete;
  // Configuring and releasing the tiles for every product would take up to 30 % of the time.
  ~AmxGemm() {
    if (height_ > 0) _tile_release();
  }

  // Micro-kernel: `rows` rows of x times one panel, as two tiles of `height` rows. The upper tile
  // ends at the last row; both hold the rows in the middle if 2 * height > rows.
  //
  // Tile map:
  //
  //                        panel columns 0-15   16-31     32-47
  //     lower rows (tmm6)  tmm0                 tmm1      tmm2
  //     upper rows (tmm6)  tmm3                 tmm4      tmm5
  //     panel              tmm7                 tmm7      tmm7
  //
  // Takes `prefetches` steps of `prefetch` per K step.
  template <class P>
  void multiply(int64_t rows, int64_t height, const BFloat16* x, int64_t in, const BFloat16* panel,
                P prefetch, int64_t prefetches, const Epilogue<Y>& epilogue) {
    static_assert(PANEL_VECTORS == 3 && LANES * 4 == AMX_ROW_BYTES);
    if (height != height_) configure(height);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    const int64_t first_upper = rows - height, stride = in * 2, panel_stride = NR * 4;
    for (int64_t k = 0; k < in; k += AMX_K_STEP, panel += NR * AMX_K_STEP) {
      for (int64_t i = 0; i < prefetches; i++) prefetch.step();
      const BFloat16 *lower = x + k, *upper = x + first_upper * in + k;
      _tile_loadd(7, panel, panel_stride);
      _tile_loadd(6, lower, stride);
      _tile_dpbf16ps(0, 6, 7);
      _tile_loadd(6, upper, stride);
      _tile_dpbf16ps(3, 6, 7);
      _tile_loadd(7, panel + 2 * LANES, panel_stride);
      _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(6, lower, stride);
      _tile_dpbf16ps(1, 6, 7);
      _tile_loadd(7, panel + 4 * LANES, panel_stride);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(6, upper, stride);
      _tile_dpbf16ps(5, 6, 7);
      finish_rows_before(waiting_.rows * (k + AMX_K_STEP) / in);
    }
    _tile_stored(0, sums_[0][0], panel_stride);
    _tile_stored(1, sums_[0][0] + LANES, panel_stride);
    _tile_stored(2, sums_[0][0] + 2 * LANES, panel_stride);
    _tile_stored(3, sums_[1][0], panel_stride);
    _tile_stored(4, sums_[1][0] + LANES, panel_stride);
    _tile_stored(5, sums_[1][0] + 2 * LANES, panel_stride);
    waiting_ = {epilogue, rows, first_upper, 0};
  }

  // Computes the epilogue of the last tile.
  void finish() { finish_rows_before(waiting_.rows); }

 private:
  // The last tile. Rows before next_row are finished.
  struct Waiting {
    Epilogue<Y> epilogue{};
    int64_t rows = 0, first_upper = 0, next_row = 0;
  };

  // Configures tiles 0 to 6 with `height` rows and tile 7 with 16, all of 64 bytes per row.
  void configure(int64_t height) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; i++) {
      shapes.bytes[i] = AMX_ROW_BYTES;
      shapes.rows[i] = static_cast<uint8_t>(i == 7 ? AMX_MAX_ROWS : height);
    }
    // Some compilers assume that _tile_loadconfig reads 8 bytes only and drop the other stores.
    __asm__ volatile("" : : "r"(&shapes) : "memory");
    _tile_loadconfig(&shapes);
    height_ = height;
  }

  // Computes the epilogue of the waiting tile's rows before `end`.
  void finish_rows_before(int64_t end) {
    for (int64_t row = waiting_.next_row; row < end; row++) {
      const float* sums =
          row < waiting_.first_upper ? sums_[0][row] : sums_[1][row - waiting_.first_upper];
      Vec values[PANEL_VECTORS];
      for (int v = 0; v < PANEL_VECTORS; v++) values[v] = load(sums + v * LANES);
      if (waiting_.epilogue.columns == NR) {
        waiting_.epilogue.template finish<true>(row, values);
      } else {
        waiting_.epilogue.template finish<false>(row, values);
      }
    }
    waiting_.next_row = end;
  }

  alignas(64) float sums_[2][AMX_MAX_ROWS][NR];  // of the waiting tile: lower and upper rows
  Waiting waiting_;
  int64_t height_ = 0;  // of the configured tiles; 0: none
};
#endif

// Whether the GEMM of this dtype runs on AMX.
template <class T>
bool uses_amx() {
#ifdef __AMX_BF16__
  return std::is_same_v<T, BFloat16> && request_amx();
#else
  return false;
#endif
}

}  // namespace gptbatch
