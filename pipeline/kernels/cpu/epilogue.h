// What becomes of the sums of a linear: bias, activation, residual, and their way to memory.

#pragma once

#include <string>

#include "common.h"

namespace gptbatch {

constexpr int VECTORS = 3;  // of sums side by side: the columns of a panel of weights
constexpr int64_t COLUMNS = VECTORS * LANES;

// As `unroll` of common.h, where a loop may call functions: without it sums leave their registers.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum class Activation { none, gelu_tanh, gelu, relu, silu, tanh };

inline Activation parse(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  TORCH_CHECK(name == "tanh", "linear: no activation ", name);
  return Activation::tanh;
}

inline Vec logistic_product(const Vec& x, const Vec& of) { return x / (Vec(1.0f) + of.neg().exp_u20()); }  // x * logistic(of)

inline Vec activate(Activation activation, const Vec& x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::gelu_tanh:  // 0.5 x (1 + tanh(z)) = x logistic(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
      return logistic_product(x, Vec(1.5957691216057308f) * (x + Vec(0.044715f) * x * x * x));
    case Activation::gelu:
      return Vec(0.5f) * x * (Vec(1.0f) + (x * Vec(0.7071067811865476f)).erf());
    case Activation::relu:
      return at::vec::maximum(x, Vec(0.0f));
    case Activation::silu:
      return logistic_product(x, x);
    default:
      return x.tanh();
  }
}

// What becomes of the sums: COLUMNS of them of each row, the first `columns` of which are real.
template <class T>
struct Ending {
  const float* bias;  // of the panel's first column; null for none
  const T* residual;  // of the tile's first number, as y; null for none
  T* y;
  int64_t stride, columns;
  Activation activation;

  // FULL: all columns are real.
  template <bool FULL>
  inline void finish(int64_t row, Vec (&sums)[VECTORS]) const {
    Vec loaded[VECTORS];
    if (residual != nullptr) read<FULL>(residual + row * stride, loaded);
    UNROLL
    for (int v = 0; v < VECTORS; v++) {
      if (bias != nullptr) sums[v] = sums[v] + load<FULL>(bias + v * LANES, v);
      if (activation != Activation::none) sums[v] = activate(activation, sums[v]);
      if (residual != nullptr) sums[v] = sums[v] + loaded[v];
    }
    write<FULL>(y + row * stride, sums);
  }

 private:
  int64_t count(int v, int64_t most) const { return std::max<int64_t>(0, std::min<int64_t>(most, columns - v * LANES)); }

  template <bool FULL>
  Vec load(const float* from, int v) const {
    return FULL ? Vec::loadu(from) : Vec::loadu(from, count(v, LANES));
  }

  template <bool FULL>
  void read(const T* from, Vec (&to)[VECTORS]) const {
    UNROLL
    for (int v = 0; v < VECTORS; v++) {
      if constexpr (std::is_same_v<T, float>) {
        to[v] = load<FULL>(from + v * LANES, v);
      } else if (v % 2 == 0) {
        const int64_t wanted = v + 1 < VECTORS ? 2 * LANES : LANES;
        const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from + v * LANES, FULL ? wanted : count(v, wanted)));
        to[v] = low;
        if (v + 1 < VECTORS) to[v + 1] = high;
      }
    }
  }

  template <bool FULL>
  void write(T* to, const Vec (&from)[VECTORS]) const {
    UNROLL
    for (int v = 0; v < VECTORS; v++) {
      if constexpr (std::is_same_v<T, float>) {
        if constexpr (FULL) {
          from[v].store(to + v * LANES);
        } else {
          from[v].store(to + v * LANES, count(v, LANES));
        }
      } else if (v % 2 == 0) {
        const Vec high = v + 1 < VECTORS ? from[v + 1] : Vec(0.0f);
        const int64_t wanted = v + 1 < VECTORS ? 2 * LANES : LANES;
        at::vec::convert_from_float<T>(from[v], high).store(to + v * LANES, FULL ? wanted : count(v, wanted));
      }
    }
  }
};

}  // namespace gptbatch
