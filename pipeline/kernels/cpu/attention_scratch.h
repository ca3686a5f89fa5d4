// Buffers of attention that a thread keeps between calls.

#pragma once

#include <cstdint>
#include <vector>

namespace gptbatch {

struct AttentionScratch {
  std::vector<float> floats;
  std::vector<int32_t> integers;
};

}  // namespace gptbatch
