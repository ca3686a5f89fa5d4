// Runs the kernels without torch and Python, and prints a hash of the bits of each result:
//
//     case  hash (FNV-1a, 64 bits)
//
// tests/test_arithmetic_programs.py compiles it together with the kernels for several instruction
// sets and compares the lines. Inputs are made from integers, by operations that are exact.

#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace gptbatch {

// Without torch: threads of the standard library.
int64_t max_threads() { return 2; }

void call_on_threads(int64_t count, void (*body)(const void* context), const void* context) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; i++) others.emplace_back(body, context);
  body(context);
  for (std::thread& thread : others) thread.join();
}

namespace {

using Floats = std::vector<float>;
using Integers = std::vector<int64_t>;

// SplitMix64 (Steele, Lea and Flood 2014) of a counter.
uint64_t random_bits(uint64_t seed, uint64_t i) {
  uint64_t z = (seed << 40) + (i + 1) * 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// Numbers from -4 to 4, most of them near 0. `scale` is a power of two.
Floats random_floats(uint64_t seed, int64_t count, float scale = 1.0f) {
  Floats x(count);
  for (int64_t i = 0; i < count; i++) {
    int64_t sum = 0;
    for (int part = 0; part < 4; part++)
      sum += static_cast<int64_t>(random_bits(seed, 4 * i + part) >> 43) - (1 << 20);
    x[i] = static_cast<float>(sum) * 0x1p-20f * scale;
  }
  return x;
}

std::vector<BFloat16> upper_halves(const Floats& x) {
  std::vector<BFloat16> halves(x.size());
  for (size_t i = 0; i < x.size(); i++)
    halves[i].bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(x[i]) >> 16);
  return halves;
}

class Hash {
 public:
  template <class T>
  Hash& add(const std::vector<T>& numbers) {
    for (const T number : numbers) {
      uint64_t bits = 0;
      std::memcpy(&bits, &number, sizeof(number));
      // NaN has many encodings: all become one.
      if (!(static_cast<double>(number) == static_cast<double>(number))) bits = 0x7FF8;
      for (size_t byte = 0; byte < sizeof(number); byte++)
        value_ = (value_ ^ ((bits >> (8 * byte)) & 0xFF)) * 0x100000001B3;
    }
    return *this;
  }
  void print(const std::string& name) const {
    std::printf("%s  %016llx\n", name.c_str(), static_cast<unsigned long long>(value_));
  }

 private:
  uint64_t value_ = 0xCBF29CE484222325;
};

std::string numbered(const char* name, int64_t a, int64_t b = -1) {
  return name + (" " + std::to_string(a)) + (b < 0 ? "" : " " + std::to_string(b));
}

Floats pack(const Floats& weight, int64_t out, int64_t in) {
  const int64_t columns = panel_columns(), panels = (out + columns - 1) / columns;
  Floats packed(panels * in * columns);
  pack_weight(weight.data(), out, in, in, packed.data());
  return packed;
}

void run_linears() {
  constexpr int64_t ROWS = 21;
  for (const auto& [in, out] : {std::pair{1, 1}, {5, 47}, {33, 48}, {301, 500}, {768, 100}}) {
    const Floats bias = random_floats(1, out), residual = random_floats(2, ROWS * out);
    // The second scale makes subnormal products.
    for (const float scale : {1.0f, 0x1p-68f}) {
      const Floats x = random_floats(3, ROWS * in, scale);
      const Floats packed = pack(random_floats(4, out * in, scale), out, in);
      const bool is_plain = scale != 1.0f;
      Floats y(ROWS * out);
      linear(x.data(), ROWS, in, packed.data(), out, is_plain ? nullptr : bias.data(),
             is_plain ? nullptr : residual.data(), Activation::none, y.data());
      Hash().add(y).print(numbered(is_plain ? "linear of subnormals" : "linear", in, out));
    }
  }
}

void run_activations() {
  // Every 40,009th float32.
  Floats grid;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 40'009)
    grid.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  for (int i = -20'000; i <= 20'000; i++) grid.push_back(static_cast<float>(i) * 0x1p-11f);
  const int64_t count = static_cast<int64_t>(grid.size());
  const Floats one = pack({1.0f}, 1, 1);
  for (const auto& [name, activation] :
       {std::pair{"gelu_tanh", Activation::gelu_tanh}, {"gelu", Activation::gelu},
        {"relu", Activation::relu}, {"silu", Activation::silu}, {"tanh", Activation::tanh}}) {
    Floats y(count);
    linear(grid.data(), count, 1, one.data(), 1, nullptr, static_cast<const float*>(nullptr),
           activation, y.data());
    Hash().add(y).print(std::string("activation ") + name);
  }
}

void run_layer_norms() {
  constexpr int64_t ROWS = 70;
  for (const int64_t width : {3, 5, 16, 31, 33, 63, 65, 100, 768}) {
    const Floats weight = random_floats(1, width), bias = random_floats(2, width);
    for (const float scale : {1.0f, 0x1p-136f}) {
      const Floats x = random_floats(3, ROWS * width, scale);
      const double epsilon = scale == 1.0f ? 1e-5 : 1e-30;
      Floats y(ROWS * width);
      layer_norm(x.data(), ROWS, width, weight.data(), bias.data(), epsilon, y.data());
      Hash().add(y).print(
          numbered(scale == 1.0f ? "layer_norm" : "layer_norm of subnormals", width));
    }
    std::vector<BFloat16> y(ROWS * width);
    layer_norm(upper_halves(random_floats(3, ROWS * width)).data(), ROWS, width,
               upper_halves(weight).data(), upper_halves(bias).data(), 1e-5, y.data());
    Hash().add(y).print(numbered("layer_norm in bfloat16", width));
  }
}

// A cache for two sequences, whose tokens alternate in long and short runs.
struct AttentionCase {
  static constexpr int64_t HEADS = 3, TOKENS = 180;

  Integers seq_indices, positions;
  std::vector<int32_t> block_table;
  std::vector<float> cache;  // or bytes
  int64_t n_blocks, block_bytes;
  PagedTokens tokens;

  AttentionCase(bool is_int8, int64_t head_size, float scale) {
    int64_t next[2] = {0, 0};
    for (int64_t t = 0; t < TOKENS; t++) {
      const int64_t seq = t % 45 < 37 ? 0 : 1;
      seq_indices.push_back(seq);
      positions.push_back(next[seq]++);
    }
    const int64_t size = is_int8 ? INT8_BLOCK_SIZE : FULL_BLOCK_SIZE;
    const int64_t per_seq = (TOKENS + size - 1) / size;
    n_blocks = 2 * per_seq;
    for (int64_t i = 0; i < n_blocks; i++)
      block_table.push_back(static_cast<int32_t>(n_blocks - 1 - i));
    block_bytes = kv_block_elements(is_int8, head_size) * (is_int8 ? 1 : 4);
    cache.resize(HEADS * n_blocks * block_bytes / 4);
    tokens = {TOKENS,  HEADS,        head_size, seq_indices.data(), positions.data(),
              block_table.data(), per_seq, cache.data(), n_blocks,     is_int8,
              scale};
  }
};

void run_attention() {
  for (const bool is_int8 : {false, true}) {
    for (const int64_t head_size : {1, 13, 64, 80}) {
      for (const float scale : {0.125f, 8.0f}) {
        AttentionCase of(is_int8, head_size, scale);
        const int64_t part = AttentionCase::HEADS * head_size;
        const Floats qkv = random_floats(head_size, AttentionCase::TOKENS * 3 * part);
        Floats out(AttentionCase::TOKENS * part);
        paged_attention(qkv.data(), 3 * part, part, head_size, of.tokens, out.data());
        const char* name = is_int8 ? "attention, int8 cache" : "attention";
        Hash().add(out).print(numbered(name, head_size, static_cast<int64_t>(8 * scale)));
      }
    }
    for (const int64_t head_size : {16, 64}) {
      constexpr int64_t IN = 77;
      const int64_t part = AttentionCase::HEADS * head_size;
      AttentionCase of(is_int8, head_size, 0.25f);
      const Floats x = random_floats(5, AttentionCase::TOKENS * IN);
      const Floats bias = random_floats(6, 3 * part);
      const Floats packed = pack(random_floats(7, 3 * part * IN, 0.125f), 3 * part, IN);
      Floats out(AttentionCase::TOKENS * part);
      qkv_paged_attention(x.data(), IN, packed.data(), 3 * part / panel_columns(), bias.data(),
                          of.tokens, out.data());
      const char* name = is_int8 ? "qkv and attention, int8 cache" : "qkv and attention";
      Hash().add(out).print(numbered(name, head_size));
    }
  }
}

void run_sampler() {
  constexpr int64_t ROWS = 40;
  constexpr double INFINITE = std::numeric_limits<double>::infinity();
  for (const int64_t vocab_size : {5, 301, 5003, 50257}) {
    Integers seeds, steps, kept_sizes;
    std::vector<double> temperatures, kept_ranges, top_ps, bounds(ROWS, 1e9);
    for (int64_t row = 0; row < ROWS; row++) {
      const auto choose = [&](int field, auto... choices) {
        const double of[] = {static_cast<double>(choices)...};
        return of[random_bits(field, row) % sizeof...(choices)];
      };
      seeds.push_back(static_cast<int64_t>(random_bits(10, row) >> 1));
      steps.push_back(static_cast<int64_t>(random_bits(11, row) % 1000));
      temperatures.push_back(choose(12, 0.3, 1.0, 2.5));
      const int64_t top_k = static_cast<int64_t>(choose(13, vocab_size, 1, 2, 40, 1000));
      kept_sizes.push_back(std::min(top_k, vocab_size));
      kept_ranges.push_back(choose(14, INFINITE, INFINITE, 3.0, 20.0));
      top_ps.push_back(choose(15, 1.0, 1.0, 0.1, 0.9, 0.999));
    }
    const SampleRows rows{seeds.data(),      steps.data(),       temperatures.data(),
                          kept_sizes.data(), kept_ranges.data(), top_ps.data(),
                          bounds.data()};
    const auto run = [&](const auto& logits, const std::string& suffix) {
      Integers tokens(ROWS), totals(ROWS);
      std::vector<double> margins(ROWS);
      Floats max_logits(ROWS);
      sample(logits.data(), ROWS, vocab_size, rows, tokens.data(), margins.data());
      total_masses(logits.data(), ROWS, vocab_size, totals.data(), max_logits.data());
      Hash().add(tokens).add(margins).print(numbered("sample", vocab_size) + suffix);
      Hash().add(totals).add(max_logits).print(numbered("masses", vocab_size) + suffix);
    };
    const Floats logits = random_floats(16, ROWS * vocab_size, 4.0f);
    run(logits, "");
    run(upper_halves(logits), " in bfloat16");
  }
}

void run_rescore() {
  constexpr int64_t ROWS = 7, VOCAB_SIZE = 5003, WIDTH = 77;
  constexpr int64_t GROUPS = (VOCAB_SIZE + TOKENS_PER_GROUP - 1) / TOKENS_PER_GROUP;
  const Floats hidden = random_floats(20, ROWS * WIDTH);
  const Floats weight = random_floats(21, VOCAB_SIZE * WIDTH, 0.25f);
  Floats logits = random_floats(22, ROWS * VOCAB_SIZE, 8.0f);
  const std::vector<double> row_factors(2 * ROWS, 0.25), group_norms(2 * GROUPS, 0.25);
  const std::vector<double> exact_ranges(ROWS, 0.5);
  const Integers kept_sizes(ROWS, 5);
  std::vector<double> thresholds(ROWS);
  rescore(logits.data(),
          {hidden.data(), weight.data(), ROWS, VOCAB_SIZE, WIDTH, row_factors.data(),
           group_norms.data(), kept_sizes.data(), exact_ranges.data()},
          thresholds.data());
  Hash().add(logits).add(thresholds).print("rescore");
}

}  // namespace
}  // namespace gptbatch

int main() {
  gptbatch::run_linears();
  gptbatch::run_activations();
  gptbatch::run_layer_norms();
  gptbatch::run_attention();
  gptbatch::run_sampler();
  gptbatch::run_rescore();
}
