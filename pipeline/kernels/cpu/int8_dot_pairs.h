// int8_dot.h without AVX512_VNNI: products of int16 pairs.
//
//     first   fine[0] and fine[2] of four, as int16 halves
//     second  fine[1] and fine[3]

#pragma once

namespace gptbatch {

struct Fours {
  int32_t* first;
  int32_t* second;

  // Puts LANES numbers at places i to i + LANES - 1; i is a multiple of 4.
  void put(int64_t i, const Vec& numbers) const {
    float fine[LANES];
    numbers.store(fine);
    for (int64_t j = 0; j < LANES; j += 4) {
      const auto pair = [&](int64_t a, int64_t b) {
        const uint32_t high = static_cast<uint32_t>(to_int(fine[b])) << 16;
        return static_cast<int32_t>(high) | (to_int(fine[a]) & 0xFFFF);
      };
      first[(i + j) / 4] = pair(j, j + 2);
      second[(i + j) / 4] = pair(j + 1, j + 3);
    }
  }
};

struct Int8Dot {
  Words sums;

  void add(const Words& bytes, const Words& four_first, const Words& four_second) {
    sums += multiply_add_pairs(bytes & 0x00FF00FF, four_first) +
            multiply_add_pairs((bytes >> 8) & 0x00FF00FF, four_second);
  }

  // fine_sum: the sum of all fine numbers, to undo the 128 that was added to each byte.
  Vec total(int32_t fine_sum) const {
    return words_to_float(sums - 128 * static_cast<uint32_t>(fine_sum));
  }
};

}  // namespace gptbatch
