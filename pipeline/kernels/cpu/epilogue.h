// Epilogue of a GEMM: bias, activation, residual, store.
//
//     y[n] = round(activation(sum[n] + bias[n]) + residual[n])

#pragma once

#include "functions.h"

namespace gptbatch {

constexpr int PANEL_VECTORS = 3;  // vectors of sums per row: the width of a packed panel
constexpr int64_t NR = PANEL_VECTORS * LANES;

// x * sigmoid(z)
inline Vec times_sigmoid(Vec x, Vec z) {
  return x / (1.0f + exp_limited(-z));
}

inline Vec activate(Activation activation, Vec x) {
  switch (activation) {
    case Activation::none:
      return x;
    // 0.5 x (1 + tanh(z)) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
    case Activation::gelu_tanh:
      return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
    case Activation::gelu:
      return 0.5f * x * (1.0f + erf_of(x * 0.70710678f));
    case Activation::relu:
      return maximum(x, Vec{});
    case Activation::silu:
      return times_sigmoid(x, x);
    default:
      return tanh_of(x);
  }
}

// x = activation(x) for `count` vectors. noinline: a copy for every vector of a tile would not fit
// the cache of decoded instructions, and its constants would not fit the registers.
template <int COUNT>
__attribute__((noinline)) void activate_all(Activation activation, Vec* x) {
  const auto apply = [&](auto chosen) {
    for (int i = 0; i < COUNT; i++) x[i] = activate(chosen, x[i]);
  };
  switch (activation) {
    case Activation::none:
      return;
    case Activation::gelu_tanh:
      return apply(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::gelu:
      return apply(std::integral_constant<Activation, Activation::gelu>());
    case Activation::relu:
      return apply(std::integral_constant<Activation, Activation::relu>());
    case Activation::silu:
      return apply(std::integral_constant<Activation, Activation::silu>());
    default:
      return apply(std::integral_constant<Activation, Activation::tanh>());
  }
}

// The epilogue of one row tile and one panel. Pointers are those of the tile's first element.
template <class T>
struct Epilogue {
  const float* bias;  // null: none
  const T* residual;  // null: none; same stride as y
  T* y;
  int64_t stride;
  int64_t columns;  // at most NR: the last panel may be partial
  Activation activation;

  // All M rows of a tile. FULL: columns == NR.
  template <bool FULL, int M>
  inline void finish_tile(Vec (&sums)[M][PANEL_VECTORS]) const {
    if (activation == Activation::none) {
      UNROLL
      for (int r = 0; r < M; r++) finish<FULL, false>(r, sums[r]);
      return;
    }
    // Not the sums themselves: GCC would keep them in memory during the GEMM.
    Vec activated[M][PANEL_VECTORS];
    UNROLL
    for (int r = 0; r < M; r++)
      UNROLL
      for (int v = 0; v < PANEL_VECTORS; v++)
        activated[r][v] =
            bias == nullptr ? sums[r][v] : sums[r][v] + load_vector<FULL>(bias, v);
    activate_all<M * PANEL_VECTORS>(activation, &activated[0][0]);
    Epilogue rest = *this;
    rest.bias = nullptr;
    UNROLL
    for (int r = 0; r < M; r++) rest.template finish<FULL, false>(r, activated[r]);
  }

  // One row. FULL: columns == NR.
  template <bool FULL, bool ACTIVATES = true>
  inline void finish(int64_t row, Vec (&sums)[PANEL_VECTORS]) const {
    UNROLL
    for (int v = 0; v < PANEL_VECTORS; v++) {
      if (bias != nullptr) sums[v] = sums[v] + load_vector<FULL>(bias, v);
      if constexpr (ACTIVATES) {
        if (activation != Activation::none) sums[v] = activate(activation, sums[v]);
      }
      if (residual != nullptr) sums[v] = sums[v] + load_vector<FULL>(residual + row * stride, v);
      store_vector<FULL>(y + row * stride, v, sums[v]);
    }
  }

 private:
  // How many columns vector v of a row has.
  int64_t count(int v) const {
    return std::max<int64_t>(0, std::min(LANES, columns - v * LANES));
  }

  template <bool FULL, class E>
  Vec load_vector(const E* row, int v) const {
    return FULL ? load(row + v * LANES) : load(row + v * LANES, count(v));
  }

  template <bool FULL>
  void store_vector(T* row, int v, Vec x) const {
    FULL ? store(row + v * LANES, x) : store(row + v * LANES, x, count(v));
  }
};

}  // namespace gptbatch
