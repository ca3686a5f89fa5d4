// bfloat16: the upper 16 bits of a float32.

#pragma once

#include <bit>
#include <cstdint>

namespace gptbatch {

// Has the layout of the BFloat16 of torch.
struct BFloat16 {
  uint16_t bits;

  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

}  // namespace gptbatch
