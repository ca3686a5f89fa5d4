// int8_dot.h without AVX512_VNNI: products of int16 pairs.
//
//     first   the integers 0 and 2 of each group of four, as the halves of a word
//     second  the integers 1 and 3

#pragma once

namespace gptbatch {

struct SplitInt16 {
  int32_t* first;
  int32_t* second;

  // Puts LANES integers at places i to i + LANES - 1; i is a multiple of 4.
  void put(int64_t i, Vec integers) const {
    float int16[LANES];
    store(int16, integers);
    for (int64_t j = 0; j < LANES; j += 4) {
      const auto pair = [&](int64_t a, int64_t b) {
        const uint32_t high = static_cast<uint32_t>(to_int(int16[b])) << 16;
        return static_cast<int32_t>(high) | (to_int(int16[a]) & 0xFFFF);
      };
      first[(i + j) / 4] = pair(j, j + 2);
      second[(i + j) / 4] = pair(j + 1, j + 3);
    }
  }
};

struct Int8Dot {
  Uint32Vec sums;

  void add(Uint32Vec bytes, Uint32Vec first, Uint32Vec second) {
    sums += multiply_add_pairs(bytes & 0x00FF00FF, first) +
            multiply_add_pairs((bytes >> 8) & 0x00FF00FF, second);
  }

  // int16_sum: the sum of all 16-bit integers, to undo the 128 that was added to each byte.
  Vec total(int32_t int16_sum) const {
    return int32_to_float(sums - 128 * static_cast<uint32_t>(int16_sum));
  }
};

}  // namespace gptbatch
