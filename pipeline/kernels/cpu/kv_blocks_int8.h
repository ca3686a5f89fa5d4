// Pages of int8, and the attention of queries over them, one page after the other.
//
// A page holds the keys and values of 64 positions, depth being D rounded up to a multiple of 32. An int8 stands as a byte, plus 128:
//
//     keys          (depth / 4, 64, 4)   four numbers of each position side by side
//     key scales    (64,)                float32: a number times its position's scale is the key's
//     values        (16, depth, 4)       a number of each of four positions side by side
//     value scales  (64,)
//
// An int8 is the number times 127 / the largest of its head and position, rounded to the nearest, ties to even. A query is rounded
// likewise, to whole numbers of up to FINE_STEPS, and so are the weights of a page, each times the scale of its value. Products
// of whole numbers have whole sums, which no order changes; what is rounded in between, page by page, is one number of each.

#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"

namespace gptbatch {

// LANES whole numbers, as the compiler's own type: + and - and * go lane by lane. Sums may wrap around on the way to a total that fits.
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));

constexpr int32_t STEPS = 127, FINE_STEPS = 127 * 257;  // 127 * 257 is the most that two bytes with a sign hold, 127 in each
constexpr float LEAST = 1e-30f;                         // where the largest is below, all is 0

inline Words load_words(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}

inline Words all_lanes(int32_t word) {
  return Words{} + static_cast<uint32_t>(word);
}

// A whole number as such, NaN as 0: what is made of that becomes NaN by its scale.
inline int32_t whole_of(float number) {
  return number == number ? static_cast<int32_t>(number) : 0;
}

// Whole numbers of up to FINE_STEPS, four at a time in two words, as `add_products` needs them. The dot product of four bytes takes
// their upper and their lower bytes, number = 256 * upper + lower; elsewhere pairs are multiplied, those at even and at odd places.
struct Fours {
  int32_t* first;
  int32_t* second;

  // Puts LANES numbers at places i to i + LANES - 1, a multiple of 4.
  void put(int64_t i, const Vec& numbers) const {
#ifdef __AVX512VNNI__
    const __m512i whole = _mm512_cvtps_epi32(numbers), upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    const __m512i lower = _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(first + i / 4), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(second + i / 4), _mm512_cvtepi32_epi8(lower));
#else
    float whole[LANES];
    numbers.store(whole);
    for (int64_t j = 0; j < LANES; j += 4) {
      const auto pair = [&](int64_t a, int64_t b) {
        return static_cast<int32_t>(static_cast<uint32_t>(whole_of(whole[b])) << 16) | (whole_of(whole[a]) & 0xFFFF);
      };
      first[(i + j) / 4] = pair(j, j + 2);
      second[(i + j) / 4] = pair(j + 1, j + 3);
    }
#endif
  }
};

// The sums of products of bytes with Fours, four of each lane a time; second is that of the lower bytes, where there are such.
struct Sums {
  Words first, second;

  void add_products(const Words& bytes, const Words& four_first, const Words& four_second) {
#ifdef __AVX512VNNI__
    first = (Words)_mm512_dpbusd_epi32((__m512i)first, (__m512i)bytes, (__m512i)four_first);
    second = (Words)_mm512_dpbusd_epi32((__m512i)second, (__m512i)bytes, (__m512i)four_second);
#else
    first += products_of_pairs(bytes & 0x00FF00FF, four_first) + products_of_pairs((bytes >> 8) & 0x00FF00FF, four_second);
#endif
  }

  // The sums of the int8 times the numbers; the bytes are 128 more, which makes 128 times the sum of the numbers.
  Vec total(int32_t sum_of_numbers) const {
#ifdef __AVX512VNNI__
    const Words all = first * 256 + second - 128 * static_cast<uint32_t>(sum_of_numbers);
#else
    const Words all = first - 128 * static_cast<uint32_t>(sum_of_numbers);
#endif
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_cvtepi32_ps((__m512i)all);
#elif defined(CPU_CAPABILITY_AVX2)
    return _mm256_cvtepi32_ps((__m256i)all);
#else
    float numbers[LANES];
    for (int64_t i = 0; i < LANES; i++) numbers[i] = static_cast<float>(static_cast<int32_t>(all[i]));
    return Vec::loadu(numbers);
#endif
  }

 private:
  static Words products_of_pairs(const Words& a, const Words& b) {
#if defined(CPU_CAPABILITY_AVX512)
    return (Words)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(CPU_CAPABILITY_AVX2)
    return (Words)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    const auto with_sign = [](uint32_t half) { return static_cast<uint32_t>(static_cast<int16_t>(half)); };
    Words sums;
    for (int64_t i = 0; i < LANES; i++) sums[i] = (a[i] & 0xFFFF) * with_sign(b[i]) + (a[i] >> 16) * with_sign(b[i] >> 16);
    return sums;
#endif
  }
};

// Rounds `count` numbers to whole ones of up to `steps`, a multiple of 2 * LANES of them, zeros at the end; returns what a step is. NaN and
// infinity make the step NaN.
template <class T>
inline float round_to_steps(const T* from, int64_t count, int32_t steps, float* whole) {
  Vec top(0.0f);
  for (int64_t d = 0; d < count; d += 2 * LANES) {
    const auto [low, high] = load_pair(from + d, count - d);
    low.store(whole + d);
    high.store(whole + d + LANES);
    top = at::vec::maximum(top, at::vec::maximum(low.abs(), high.abs()));
  }
  const float largest = largest_of(top), nothing = largest - largest;  // 0, or NaN
  const Vec factor(largest >= LEAST && nothing == 0.0f ? static_cast<float>(steps) / largest : 0.0f);
  for (int64_t d = 0; d < count; d += LANES) (Vec::loadu(whole + d) * factor).round().store(whole + d);
  return largest / static_cast<float>(steps) + nothing;
}

// One head of the cache, as one slot sees it. T: the type of queries, keys and values.
template <class T>
class Int8Pages {
 public:
  using Number = uint8_t;
  static constexpr int64_t SIZE = 64;

  static int64_t page_numbers(int64_t depth) { return 2 * SIZE * (depth + SCALE_BYTES); }

  Int8Pages(int64_t depth, const int32_t* pages, Number* cache) : depth_(depth), pages_(pages), cache_(cache) {}

  // Writes a key and a value to their place.
  void write(int64_t position, const T* key, const T* value, int64_t head_size, Scratch& scratch) const {
    const int64_t page = position / SIZE, place = position % SIZE;
    scratch.numbers.resize(depth_);
    float* whole = scratch.numbers.data();
    key_scales(page)[place] = round_to_steps(key, head_size, STEPS, whole);
    uint8_t* to = keys(page) + place * 4;
    for (int64_t d = 0; d < head_size; d += 4, to += SIZE * 4)
      for (int64_t i = 0; i < 4; i++) to[i] = byte_of(whole[d + i]);
    value_scales(page)[place] = round_to_steps(value, head_size, STEPS, whole);
    to = values(page) + place / 4 * depth_ * 4 + place % 4;
    for (int64_t d = 0; d < head_size; d++) to[d * 4] = byte_of(whole[d]);
  }

  // Q queries at consecutive positions, the first of which sees first_count keys: mixed (Q, depth) and totals (Q,), which divide it.
  // write_own() is called before the last page is read.
  template <int Q, class F>
  void attend(const T* q, int64_t q_stride, int64_t head_size, float scale, int64_t first_count, const F& write_own, Lookahead& ahead,
              float* mixed, float* totals, Scratch& scratch) const {
    scratch.numbers.resize(depth_);
    scratch.words.resize(Q * depth_ / 2);
    float* whole = scratch.numbers.data();
    const int32_t steps = static_cast<int32_t>(std::min<int64_t>(FINE_STEPS, std::numeric_limits<int32_t>::max() / (128 * depth_)));
    Query<Q> queries;
    for (int i = 0; i < Q; i++) {
      int32_t* words = scratch.words.data() + i * depth_ / 2;
      const Fours fours{words, words + depth_ / 4};
      std::fill(whole, whole + depth_, 0.0f);
      queries.scales[i] = scale * round_to_steps(q + i * q_stride, head_size, steps, whole);
      Vec sum(0.0f);
      for (int64_t d = 0; d < depth_; d += LANES) {
        const Vec numbers = Vec::loadu(whole + d);
        fours.put(d, numbers);
        sum = sum + numbers;
      }
      queries.fours[i] = fours;
      queries.sums[i] = whole_of(sum_of(sum));
    }
    std::fill(mixed, mixed + Q * depth_, 0.0f);
    Running<Q> running;
    const int64_t n_pages = (first_count + Q - 1 + SIZE - 1) / SIZE;
    for (int64_t page = 0; page < n_pages; page++) {
      if (page + 1 == n_pages) write_own();
      add_page<Q>(page, queries, first_count - page * SIZE, ahead, running, mixed);
    }
    for (int i = 0; i < Q; i++) totals[i] = running.total[i];
  }

  // Adds the halves of a sequence's pages, in the order in which they are read.
  static void order(const int32_t* pages, int64_t count, std::vector<int32_t>& halves) {
    for (int64_t i = 0; i < count; i++) halves.push_back(2 * pages[i]), halves.push_back(2 * pages[i] + 1);
  }

 private:
  static constexpr int64_t SCALE_BYTES = sizeof(float);
  static constexpr int VECTORS = SIZE / LANES;  // of one number of each position

  template <int Q>
  struct Query {
    Fours fours[Q];
    int32_t sums[Q];
    float scales[Q];
  };

  // The largest score so far, and the sum of exp(score - largest).
  template <int Q>
  struct Running {
    float largest[Q], total[Q];
    Running() {
      std::fill(largest, largest + Q, -std::numeric_limits<float>::infinity());
      std::fill(total, total + Q, 0.0f);
    }
  };

  // The weights of a page, of each query: whole numbers, what one of them stands for, and what becomes of all that was summed before.
  template <int Q>
  struct Weights {
    int32_t first[Q][SIZE / 4], second[Q][SIZE / 4], sums[Q];
    float steps[Q], before[Q];
  };

  static uint8_t byte_of(float whole) { return static_cast<uint8_t>(whole_of(whole) + 128); }

  uint8_t* keys(int64_t i) const { return cache_ + pages_[i] * page_numbers(depth_); }
  uint8_t* values(int64_t i) const { return keys(i) + SIZE * (depth_ + SCALE_BYTES); }
  float* key_scales(int64_t i) const { return reinterpret_cast<float*>(keys(i) + SIZE * depth_); }
  float* value_scales(int64_t i) const { return reinterpret_cast<float*>(values(i) + SIZE * depth_); }

  // Query q sees count + q positions of the page, where that is above 0.
  template <int Q>
  void add_page(int64_t page, const Query<Q>& queries, int64_t count, Lookahead& ahead, Running<Q>& running, float* mixed) const {
    // a few lines at a time: CPUs drop what they cannot note; weighing takes the longest
    const int64_t asks = 2 * ahead.pace(), some = asks / 8, amid_weighing = asks / 2 / (Q * VECTORS);
    float scores[Q][SIZE];
    ahead.ask(some);
    score<Q>(page, queries, scores);
    ahead.ask(some);
    Weights<Q> weights;
    for (int i = 0; i < Q; i++) weigh<Q>(scores[i], value_scales(page), std::min(SIZE, count + i), i, ahead, amid_weighing, running, weights);
    ahead.ask(some);
    mix<Q>(page, weights, (std::min(SIZE, count + Q - 1) + 3) / 4, mixed);
    ahead.ask(asks - 3 * some - Q * VECTORS * amid_weighing);
  }

  template <int Q>
  FLAT void score(int64_t page, const Query<Q>& queries, float (*scores)[SIZE]) const {
    constexpr int N = std::min(VECTORS, Q == 1 ? 4 : 2);
    for (int64_t v = 0; v < VECTORS; v += N) {
      const uint8_t* from = keys(page) + v * LANES * 4;
      Sums sums[Q][N];
      unroll<Q>([&](auto q) { unroll<N>([&](auto n) { sums[q][n] = {Words{}, Words{}}; }); });
      for (int64_t j = 0; j < depth_ / 4; j++, from += SIZE * 4) {
        Words bytes[N];
        unroll<N>([&](auto n) { bytes[n] = load_words(from + n * LANES * 4); });
        unroll<Q>([&](auto q) {
          const Words first = all_lanes(queries.fours[q].first[j]), second = all_lanes(queries.fours[q].second[j]);
          unroll<N>([&](auto n) { sums[q][n].add_products(bytes[n], first, second); });
        });
      }
      unroll<N>([&](auto n) {
        const Vec scale = Vec::loadu(key_scales(page) + (v + n) * LANES);
        unroll<Q>([&](auto q) {
          (sums[q][n].total(queries.sums[q]) * (scale * Vec(queries.scales[q]))).store(scores[q] + (v + n) * LANES);
        });
      });
    }
  }

  // The weights of query i, which sees the first `count` positions. What the others hold, scales too, may be anything. asks: lines that
  // are asked for at each vector.
  template <int Q>
  static void weigh(const float* scores, const float* scales, int64_t count, int i, Lookahead& ahead, int64_t asks, Running<Q>& running,
                    Weights<Q>& weights) {
    const Fours fours{weights.first[i], weights.second[i]};
    if (count <= 0) {
      std::fill(fours.first, fours.first + SIZE / 4, 0);
      std::fill(fours.second, fours.second + SIZE / 4, 0);
      weights.sums[i] = 0, weights.steps[i] = 0.0f, weights.before[i] = 1.0f;
      return;
    }
    constexpr float NEVER = -std::numeric_limits<float>::infinity();
    Vec own[VECTORS], scale[VECTORS], top(NEVER);
    for (int v = 0; v < VECTORS; v++) {
      const int64_t here = count - v * LANES;
      own[v] = Vec::loadu(scores + v * LANES), scale[v] = Vec::loadu(scales + v * LANES);
      if (here < LANES) {
        own[v] = Vec::set(Vec(NEVER), own[v], std::max<int64_t>(here, 0));
        scale[v] = Vec::set(Vec(0.0f), scale[v], std::max<int64_t>(here, 0));
      }
      top = at::vec::maximum(top, own[v]);
    }
    const float now = std::max(largest_of(top), running.largest[i]), nothing = now - now;  // 0, or NaN
    Vec total(nothing), top_product(0.0f), sum(0.0f);
    for (int v = 0; v < VECTORS; v++) {
      ahead.ask(asks);
      const Vec weight = (own[v] - Vec(now)).exp_u20();
      total = total + weight;
      own[v] = weight * scale[v];
      top_product = at::vec::maximum(top_product, own[v]);
    }
    const float largest = largest_of(top_product);
    const Vec factor(largest >= LEAST ? FINE_STEPS / largest : 0.0f);
    for (int v = 0; v < VECTORS; v++) {
      const Vec whole = (own[v] * factor).round();
      sum = sum + whole;
      fours.put(v * LANES, whole);
    }
    const float before = std::exp(running.largest[i] - now);
    running.largest[i] = now;
    running.total[i] = running.total[i] * before + sum_of(total);
    weights.sums[i] = whole_of(sum_of(sum));
    weights.steps[i] = largest / FINE_STEPS;
    weights.before[i] = before;
  }

  template <int Q>
  void mix(int64_t page, const Weights<Q>& weights, int64_t n_fours, float* mixed) const {
    constexpr int N = 32 / LANES;
    int64_t d = 0;
    if constexpr (Q == 1)
      for (; d + 2 * N * LANES <= depth_; d += 2 * N * LANES) mix_columns<Q, 2 * N>(page, weights, n_fours, d, mixed);
    for (; d < depth_; d += N * LANES) mix_columns<Q, N>(page, weights, n_fours, d, mixed);
  }

  template <int Q, int N>
  FLAT void mix_columns(int64_t page, const Weights<Q>& weights, int64_t n_fours, int64_t d0, float* mixed) const {
    Sums sums[Q][N];
    unroll<Q>([&](auto q) { unroll<N>([&](auto n) { sums[q][n] = {Words{}, Words{}}; }); });
    const uint8_t* from = values(page) + d0 * 4;
    for (int64_t j = 0; j < n_fours; j++, from += depth_ * 4) {
      Words bytes[N];
      unroll<N>([&](auto n) { bytes[n] = load_words(from + n * LANES * 4); });
      unroll<Q>([&](auto q) {
        const Words first = all_lanes(weights.first[q][j]), second = all_lanes(weights.second[q][j]);
        unroll<N>([&](auto n) { sums[q][n].add_products(bytes[n], first, second); });
      });
    }
    unroll<Q>([&](auto q) {
      const Vec before(weights.before[q]), step(weights.steps[q]);
      unroll<N>([&](auto n) {
        float* to = mixed + q * depth_ + d0 + n * LANES;
        at::vec::fmadd(sums[q][n].total(weights.sums[q]), step, Vec::loadu(to) * before).store(to);
      });
    });
  }

  int64_t depth_;
  const int32_t* pages_;  // of the slot
  uint8_t* cache_;        // of the head
};

}  // namespace gptbatch
