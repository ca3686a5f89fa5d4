// Vectors of 32-bit integers for the dot products of int8.

#pragma once

#include <cstring>

#include "simd.h"

namespace gptbatch {

// The compiler's own vector type: + - * work lane by lane and wrap around.
typedef uint32_t Uint32Vec __attribute__((vector_size(LANES * sizeof(uint32_t))));

inline Uint32Vec load_uint32(const void* from) {
  Uint32Vec lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

inline Uint32Vec broadcast_uint32(int32_t value) {
  return Uint32Vec{} + static_cast<uint32_t>(value);
}

// Converts an integer in float32; NaN becomes 0. A NaN scale then makes the result NaN.
inline int32_t to_int(float whole) {
  return whole == whole ? static_cast<int32_t>(whole) : 0;
}

}  // namespace gptbatch
