// Rows of x times a panel of weights, each number's sum in one fixed order, whatever else is computed.
//
//     x       (rows, in)     float32 or bfloat16
//     panel   (in, COLUMNS)  columns of W^T; in bfloat16 two rows of W^T stand interleaved

#pragma once

#include <ATen/ops/constant_pad_nd.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "epilogue.h"

namespace gptbatch {

constexpr int ROWS = LANES == 16 ? 8 : 4;  // of x, by a panel: as many sums as there are registers for
constexpr int64_t ROWS_AT_ONCE = 256;      // of x, at most: they stay near while the panels pass by
constexpr int64_t SMALL = 1 << 18;         // multiplications that are not worth waking the other threads for
#ifdef __AVX512BF16__
constexpr bool HAS_BFLOAT16 = true;
#else
constexpr bool HAS_BFLOAT16 = false;
#endif
constexpr int64_t AMX_ROWS = 16, AMX_BYTES = 64;  // the most that a register of AMX holds
#ifdef __AMX_BF16__
constexpr int64_t BFLOAT16_INPUTS = 32;  // that a sum in bfloat16 takes at a time
#else
constexpr int64_t BFLOAT16_INPUTS = 2;
#endif

// One step of a sum: DEPTH inputs at a time.
template <class T>
struct Step;

template <>
struct Step<float> {
  static constexpr int64_t DEPTH = 1;
  static Vec load(const float* weights) { return Vec::loadu(weights); }
  static Vec broadcast(const float* x) { return Vec(*x); }
  static Vec add(const Vec& x, const Vec& weights, const Vec& sum) { return at::vec::fmadd(x, weights, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Step<at::BFloat16> {
  static constexpr int64_t DEPTH = 2;
  static __m512i load(const at::BFloat16* weights) { return _mm512_loadu_si512(weights); }
  static __m512i broadcast(const at::BFloat16* x) {
    int pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Vec add(__m512i x, __m512i weights, const Vec& sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)weights); }
};
#endif

// What is asked for on the way, into the second cache: at each step a line that follows the last, and LISTED of a list.
template <int LISTED>
struct Ahead {
  const char* line;
  const char* const* listed;

  void step() {
    __builtin_prefetch(line, 0, 2);
    line += CACHE_LINE;
    UNROLL
    for (int i = 0; i < LISTED; i++) __builtin_prefetch(listed[i], 0, 2);
    listed += LISTED;
  }
};

// M rows of x times one panel. A function of its own wherever it is used: amid others its sums leave their registers.
template <class T, int M, class A, class Y>
__attribute__((noinline)) void multiply(const T* x, int64_t in, const T* panel, A ahead, const Ending<Y>& ending) {
  using S = Step<T>;
  Vec sums[M][VECTORS];
  UNROLL
  for (int r = 0; r < M; r++)
    UNROLL
    for (int v = 0; v < VECTORS; v++) sums[r][v] = Vec(0.0f);
  for (int64_t k = 0; k < in; k += S::DEPTH, panel += COLUMNS * S::DEPTH) {
    ahead.step();
    decltype(S::load(panel)) weights[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; v++) weights[v] = S::load(panel + v * LANES * S::DEPTH);
    UNROLL
    for (int r = 0; r < M; r++) {
      const auto input = S::broadcast(x + r * in + k);
      UNROLL
      for (int v = 0; v < VECTORS; v++) sums[r][v] = S::add(input, weights[v], sums[r][v]);
    }
  }
  if (ending.columns == COLUMNS) {
    UNROLL
    for (int r = 0; r < M; r++) ending.template finish<true>(r, sums[r]);
  } else {
    UNROLL
    for (int r = 0; r < M; r++) ending.template finish<false>(r, sums[r]);
  }
}

// 1 to ROWS rows of x times one panel.
template <class T, int M = ROWS, class A, class Y>
inline void multiply_rows(int64_t rows, const T* x, int64_t in, const T* panel, A ahead, const Ending<Y>& ending) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<T, M - 1>(rows, x, in, panel, ahead, ending);
  }
  multiply<T, M>(x, in, panel, ahead, ending);
}

#ifdef __AMX_BF16__
// Whether the system lets this process use AMX; it wants to be asked.
inline bool may_use_amx() {
  constexpr int ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
  return granted;
}

// Up to 2 * AMX_ROWS rows of x times one panel: two registers of x of one height, with a row in common where the number is odd, by
// the three of the panel. Takes `asks` steps of `ahead` at each of its own.
template <class A, class Y>
void multiply_amx(int64_t rows, const at::BFloat16* x, int64_t in, const at::BFloat16* panel, A ahead, int64_t asks,
                  const Ending<Y>& ending) {
  static_assert(VECTORS == 3 && LANES * 4 == AMX_BYTES);
  const int64_t height = (rows + 1) / 2, second = rows - height;
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; i++) {  // 0 to 5 sum, 6 is of x, 7 of the panel
    shapes.bytes[i] = AMX_BYTES;
    shapes.rows[i] = static_cast<uint8_t>(i == 7 ? AMX_ROWS : height);
  }
  __asm__ volatile("" : : "r"(&shapes) : "memory");  // some compilers take it that just its first 8 bytes are read
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  const int64_t stride = in * 2, panel_stride = COLUMNS * 4;
  for (int64_t k = 0; k < in; k += BFLOAT16_INPUTS, panel += COLUMNS * BFLOAT16_INPUTS) {
    for (int64_t i = 0; i < asks; i++) ahead.step();
    const at::BFloat16 *low = x + k, *high = x + second * in + k;
    _tile_loadd(7, panel, panel_stride);
    _tile_loadd(6, low, stride);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(6, high, stride);
    _tile_dpbf16ps(3, 6, 7);
    _tile_loadd(7, panel + 2 * LANES, panel_stride);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(6, low, stride);
    _tile_dpbf16ps(1, 6, 7);
    _tile_loadd(7, panel + 4 * LANES, panel_stride);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(6, high, stride);
    _tile_dpbf16ps(5, 6, 7);
  }
  alignas(64) float sums[2][AMX_ROWS][COLUMNS];
  _tile_stored(0, sums[0][0], panel_stride);
  _tile_stored(1, sums[0][0] + LANES, panel_stride);
  _tile_stored(2, sums[0][0] + 2 * LANES, panel_stride);
  _tile_stored(3, sums[1][0], panel_stride);
  _tile_stored(4, sums[1][0] + LANES, panel_stride);
  _tile_stored(5, sums[1][0] + 2 * LANES, panel_stride);
  _tile_release();
  for (int64_t row = 0; row < rows; row++) {
    const float* of_row = row < height ? sums[0][row] : sums[1][row - second];
    Vec numbers[VECTORS];
    for (int v = 0; v < VECTORS; v++) numbers[v] = Vec::loadu(of_row + v * LANES);
    if (ending.columns == COLUMNS) {
      ending.template finish<true>(row, numbers);
    } else {
      ending.template finish<false>(row, numbers);
    }
  }
}
#endif

// Rows of x in tiles, of about equal size: a few rows alone take longer than as many more of a large tile.
template <class T>
class Tiles {
 public:
  Tiles(const T* x, int64_t rows, int64_t in) : x_(x), rows_(rows), in_(in) {
    count_ = (rows + most_rows() - 1) / most_rows();
    steps_ = in / (uses_amx() ? BFLOAT16_INPUTS : Step<T>::DEPTH);
    share_ = (in * COLUMNS * static_cast<int64_t>(sizeof(T)) / CACHE_LINE + count_ - 1) / count_;
    asks_ = uses_amx() ? (share_ + steps_ - 1) / steps_ : 1;
  }

  int64_t count() const { return count_; }
  static int64_t most_rows() { return uses_amx() ? 2 * AMX_ROWS : ROWS; }
  int64_t first_row(int64_t tile) const { return rows_ * tile / count_; }
  // Lines that a tile asks for while it is multiplied, of each kind.
  int64_t asks() const { return steps_ * asks_; }

  // Tile times panel; asks for its share of the panel `next`, or for what it gets to of that, and for LISTED * asks() lines of a list.
  template <int LISTED, class Y>
  void multiply(int64_t tile, const T* panel, const T* next, const char* const* listed, const Ending<Y>& ending) const {
    const int64_t row = first_row(tile), rows = first_row(tile + 1) - row;
    const Ahead<LISTED> ahead{reinterpret_cast<const char*>(next) + tile * std::min(share_, asks()) * CACHE_LINE, listed};
#ifdef __AMX_BF16__
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      if (uses_amx()) return multiply_amx(rows, x_ + row * in_, in_, panel, ahead, asks_, ending);
    }
#endif
    multiply_rows<T>(rows, x_ + row * in_, in_, panel, ahead, ending);
  }

 private:
  static bool uses_amx() {
#ifdef __AMX_BF16__
    return std::is_same_v<T, at::BFloat16> && may_use_amx();
#else
    return false;
#endif
  }

  const T* x_;
  int64_t rows_, in_, count_, steps_, share_, asks_;
};

// x as a packed weight (panels, in, COLUMNS) of so many columns takes it.
inline at::Tensor fitting(const at::Tensor& x, const at::Tensor& packed, int64_t out_features) {
  const int64_t missing = x.dim() == 2 && packed.dim() == 3 ? packed.size(1) - x.size(1) : -1;  // inputs that were rounded up, in bfloat16
  TORCH_CHECK((missing == 0 || (missing > 0 && missing < BFLOAT16_INPUTS && x.scalar_type() == at::kBFloat16)) && packed.size(2) == COLUMNS &&
                  packed.size(0) == (out_features + COLUMNS - 1) / COLUMNS,
              "linear: the shapes do not fit each other");
  TORCH_CHECK(x.scalar_type() == packed.scalar_type() && (x.scalar_type() == at::kFloat || HAS_BFLOAT16), "linear: the types do not fit");
  return missing == 0 ? x.contiguous() : at::constant_pad_nd(x, {0, missing});
}

}  // namespace gptbatch
