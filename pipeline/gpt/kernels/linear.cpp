// The linear layer: y = activation(x W^T + b) or x W^T + b + residual, each number's sum in one fixed order.
//
//     gptbatch::pack(weight) -> packed
//     gptbatch::linear(x, packed, out_features, bias, residual, activation) -> y
//     gptbatch::widened_linear(x, packed, y): the same into y, float32 where x is bfloat16
//
//     weight    (out, in)              float32 or bfloat16
//     packed    (panels, in, COLUMNS)  the columns of W^T in panels of COLUMNS, zeros after the last; in bfloat16 two rows of W^T
//                                      stand interleaved (in is rounded up to a multiple of 2, with AMX of 32)
//     x         (N, in)                y and residual (N, out), bias (out,) float32
//
// A number of y is a sum over the inputs 0, 1, 2, ... by fused multiply-add in float32 (in bfloat16 by the CPU's dot product of
// pairs, or by its product of matrices, AMX, 32 inputs a time), then bias, activation or residual, and is rounded once: it depends on
// its row of x alone, whatever the number of rows and threads. bfloat16 needs AVX512_BF16: `has_bfloat16` says whether it is there.
//
// A panel comes from memory once for each ROWS_AT_ONCE rows. While a thread works on one, it asks for the next one of its own; the
// hardware does not look so far ahead, and at 64 rows waiting for weights would take a sixth of the time.

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <optional>
#include <string>

#include "ending.h"

namespace {

using namespace gptbatch;

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

// M rows of x times one panel; asks for a line of `ahead` at each step.
template <class T, int M, class Y>
inline void multiply(const T* x, int64_t in, const T* panel, const char* ahead, const Ending<Y>& ending) {
  using S = Step<T>;
  Vec sums[M][VECTORS];
  UNROLL
  for (int r = 0; r < M; r++)
    UNROLL
    for (int v = 0; v < VECTORS; v++) sums[r][v] = Vec(0.0f);
  for (int64_t k = 0; k < in; k += S::DEPTH, panel += COLUMNS * S::DEPTH, ahead += CACHE_LINE) {
    __builtin_prefetch(ahead, 0, 2);
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
template <class T, int M = ROWS, class Y>
inline void multiply_rows(int64_t rows, const T* x, int64_t in, const T* panel, const char* ahead, const Ending<Y>& ending) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<T, M - 1>(rows, x, in, panel, ahead, ending);
  }
  multiply<T, M>(x, in, panel, ahead, ending);
}

#ifdef __AMX_BF16__
// Whether the system lets this process use AMX; it wants to be asked.
bool may_use_amx() {
  constexpr int ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
  return granted;
}

// Up to 2 * AMX_ROWS rows of x times one panel: two registers of x of one height, with a row in common where the number is odd, by
// the three of the panel. Asks for `lines` lines of `ahead` at each step.
template <class Y>
void multiply_amx(int64_t rows, const at::BFloat16* x, int64_t in, const at::BFloat16* panel, const char* ahead, int64_t lines,
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
    for (int64_t i = 0; i < lines; i++, ahead += CACHE_LINE) __builtin_prefetch(ahead, 0, 2);
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

template <class T, class Y>
void run(const at::Tensor& x, const at::Tensor& packed, const float* bias, const Y* residual, Activation activation, at::Tensor& y) {
  const int64_t rows = x.size(0), in = x.size(1), panels = packed.size(0), out = y.size(1), panel_size = in * COLUMNS;
  const T *inputs = x.const_data_ptr<T>(), *weights = packed.const_data_ptr<T>();
  Y* outputs = y.data_ptr<Y>();
  // chunks of about equal size: a small one would wait for its weights
  const int64_t chunks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, items = chunks * panels;
#ifdef __AMX_BF16__
  const bool amx = std::is_same_v<T, at::BFloat16> && may_use_amx();
#else
  constexpr bool amx = false;
#endif
  const int64_t tile_rows = amx ? 2 * AMX_ROWS : ROWS, depth = amx ? BFLOAT16_INPUTS : Step<T>::DEPTH;
  const int64_t chunk_rows = ((rows + chunks - 1) / chunks + tile_rows - 1) / tile_rows * tile_rows;
  const int64_t threads = rows * in * out < SMALL ? 1 : at::get_num_threads();
  const auto work = [&](int64_t item) {
    const int64_t chunk = item / panels, panel = item % panels, column = panel * COLUMNS;
    const int64_t first = std::min(rows, chunk * chunk_rows), last = std::min(rows, first + chunk_rows);
    // the panel that this thread is likely to take next, a slice of it for each tile
    const char* next = reinterpret_cast<const char*>(weights + std::min(panel + threads, panels - 1) * panel_size);
    const int64_t lines = panel_size * static_cast<int64_t>(sizeof(T)) / CACHE_LINE, tiles = (last - first + tile_rows - 1) / tile_rows;
    const int64_t steps = in / depth, share = (lines + tiles - 1) / tiles, a_step = amx ? (share + steps - 1) / steps : 1;
    const int64_t slice = std::min(share, steps * a_step) * CACHE_LINE;
    for (int64_t tile = 0; tile < tiles; tile++) {
      // of about equal size, too: a few rows alone take longer than as many more of a large one
      const int64_t row = first + (last - first) * tile / tiles, end = first + (last - first) * (tile + 1) / tiles;
      const int64_t at = row * out + column;
      const Ending<Y> ending{bias == nullptr ? nullptr : bias + column, residual == nullptr ? nullptr : residual + at, outputs + at, out,
                             std::min(COLUMNS, out - column), activation};
      const T *x_of_tile = inputs + row * in, *panel_of_item = weights + panel * panel_size;
#ifdef __AMX_BF16__
      if constexpr (std::is_same_v<T, at::BFloat16>) {
        if (amx) {
          multiply_amx(end - row, x_of_tile, in, panel_of_item, next + tile * slice, a_step, ending);
          continue;
        }
      }
#endif
      multiply_rows<T>(end - row, x_of_tile, in, panel_of_item, next + tile * slice, ending);
    }
  };
  if (threads == 1) {
    for (int64_t item = 0; item < items; item++) work(item);
  } else {
    for_each(items, 1, work);
  }
}

// x as the packed weight takes it.
at::Tensor fitting(const at::Tensor& x, const at::Tensor& packed, int64_t out_features) {
  const int64_t missing = x.dim() == 2 && packed.dim() == 3 ? packed.size(1) - x.size(1) : -1;  // inputs that were rounded up, in bfloat16
  TORCH_CHECK((missing == 0 || (missing > 0 && missing < BFLOAT16_INPUTS && x.scalar_type() == at::kBFloat16)) && packed.size(2) == COLUMNS &&
                  packed.size(0) == (out_features + COLUMNS - 1) / COLUMNS,
              "linear: the shapes do not fit each other");
  TORCH_CHECK(x.scalar_type() == packed.scalar_type() && (x.scalar_type() == at::kFloat || HAS_BFLOAT16), "linear: the types do not fit");
  return missing == 0 ? x.contiguous() : at::constant_pad_nd(x, {0, missing});
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, int64_t out_features, const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& residual, std::string activation) {
  const at::Tensor inputs = fitting(x, packed, out_features);
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == out_features), "linear: bias");
  at::Tensor y = at::empty({x.size(0), out_features}, x.options());
  const at::Tensor added = residual ? residual->contiguous() : at::Tensor();
  TORCH_CHECK(!residual || (added.sizes() == y.sizes() && added.scalar_type() == y.scalar_type()), "linear: residual");
  if (x.size(0) == 0) return y;
  const float* b = bias ? bias->const_data_ptr<float>() : nullptr;
  if (x.scalar_type() == at::kFloat) {
    run<float, float>(inputs, packed, b, residual ? added.const_data_ptr<float>() : nullptr, parse(activation), y);
  } else {
#ifdef __AVX512BF16__
    run<at::BFloat16, at::BFloat16>(inputs, packed, b, residual ? added.const_data_ptr<at::BFloat16>() : nullptr, parse(activation), y);
#endif
  }
  return y;
}

void widened_linear(const at::Tensor& x, const at::Tensor& packed, at::Tensor& y) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && y.scalar_type() == at::kFloat && y.is_contiguous() && y.size(0) == x.size(0),
              "widened_linear: the types or shapes do not fit");
  const at::Tensor inputs = fitting(x, packed, y.size(1));
#ifdef __AVX512BF16__
  if (x.size(0) > 0) run<at::BFloat16, float>(inputs, packed, nullptr, nullptr, Activation::none, y);
#endif
}

template <class T>
void fill(const at::Tensor& weight, int64_t depth, at::Tensor& packed) {
  const int64_t out = weight.size(0), in = weight.size(1), padded = packed.size(1);
  const T* from = weight.const_data_ptr<T>();
  T* to = packed.data_ptr<T>();
  for_each(packed.size(0), 1, [&](int64_t panel) {
    for (int64_t c = 0; c < std::min(COLUMNS, out - panel * COLUMNS); c++)
      for (int64_t k = 0; k < in; k++)
        to[panel * padded * COLUMNS + k / depth * depth * COLUMNS + c * depth + k % depth] = from[(panel * COLUMNS + c) * in + k];
  });
}

at::Tensor pack(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "pack: a contiguous matrix is needed");
  const bool wide = weight.scalar_type() == at::kFloat;
  TORCH_CHECK(wide || (HAS_BFLOAT16 && weight.scalar_type() == at::kBFloat16), "pack: float32, or bfloat16 where the CPU computes in it");
  const int64_t multiple = wide ? 1 : BFLOAT16_INPUTS, in = (weight.size(1) + multiple - 1) / multiple * multiple;
  at::Tensor packed = at::zeros({(weight.size(0) + COLUMNS - 1) / COLUMNS, in, COLUMNS}, weight.options());
  if (wide) {
    fill<float>(weight, 1, packed);
  } else {
    fill<at::BFloat16>(weight, 2, packed);
  }
  return packed;
}

bool has_bfloat16() { return HAS_BFLOAT16; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(gptbatch, library) {
  library.def("pack(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, int out_features, Tensor? bias, Tensor? residual, str activation) -> Tensor");
  library.def("widened_linear(Tensor x, Tensor packed, Tensor(a!) y) -> ()");
  library.def("has_bfloat16() -> bool", has_bfloat16);
}

TORCH_LIBRARY_IMPL(gptbatch, CPU, library) {
  library.impl("pack", pack);
  library.impl("linear", linear);
  library.impl("widened_linear", widened_linear);
}
