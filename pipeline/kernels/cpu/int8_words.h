// Vectors of 32-bit integers for the dot products of int8.

#pragma once

#include <cstring>

#include "simd.h"

namespace gptbatch {

// The compiler's own vector type: + - * work lane by lane and wrap around.
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));

inline Words load_words(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}

inline Words broadcast_word(int32_t word) { return Words{} + static_cast<uint32_t>(word); }

// Converts a whole number; NaN becomes 0. A NaN scale then makes the result NaN.
inline int32_t to_int(float number) {
  return number == number ? static_cast<int32_t>(number) : 0;
}

}  // namespace gptbatch
