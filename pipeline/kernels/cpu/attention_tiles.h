// The tokens of one attention call: which queries share a pass over the KV blocks, what each token
// writes to the cache, and what it reads.

#pragma once

#include <vector>

#include "attention_scratch.h"
#include "prefetch.h"

namespace gptbatch {

constexpr int MAX_QUERIES_PER_TILE = 4;  // of one sequence, at consecutive positions

// Queries, keys and values of one head. Those of token t start at data + t * stride, at
// distances of part_stride.
template <class T>
struct HeadQkv {
  const T* data;
  int64_t stride, part_stride;

  const T* query(int64_t token) const { return data + token * stride; }
  const T* key(int64_t token) const { return query(token) + part_stride; }
  const T* value(int64_t token) const { return key(token) + part_stride; }
};

// T: the dtype of queries, keys, values and output. Blocks: FullBlocks<T> or Int8Blocks<T>.
template <class T, class Blocks>
class AttentionTiles {
 public:
  // out (n_tokens, H D).
  AttentionTiles(const PagedTokens& tokens, T* out)
      : tokens_(tokens),
        padded_size_((tokens.head_size + HEAD_SIZE_MULTIPLE - 1) / HEAD_SIZE_MULTIPLE *
                     HEAD_SIZE_MULTIPLE),
        elements_per_head_(tokens.n_blocks * Blocks::block_elements(padded_size_)),
        cache_(static_cast<typename Blocks::Element*>(tokens.cache)),
        out_(out) {
    const int64_t *seq = tokens.seq_indices, *position = tokens.positions, count = tokens.n_tokens;
    for (int64_t t = 0; t < count;) {
      int64_t n = 1;
      while (n < MAX_QUERIES_PER_TILE && t + n < count && seq[t + n] == seq[t] &&
             position[t + n] == position[t] + n)
        n++;
      // The micro-kernels take MAX_QUERIES_PER_TILE queries or one.
      n = n == MAX_QUERIES_PER_TILE ? n : 1;
      // A partial block belongs to one sequence. Only full blocks are shared.
      const bool is_partial = position[t] % Blocks::SIZE != Blocks::SIZE - 1;
      const bool is_alone = n == 1 && is_partial && (t == 0 || seq[t - 1] != seq[t]) &&
                            (t + 1 == count || seq[t + 1] != seq[t]);
      if (!is_alone)
        for (int64_t i = 0; i < n; i++) shared_tokens_.push_back(t + i);
      tiles_.push_back({t, n, is_alone, static_cast<int64_t>(halves_.size())});
      const int64_t n_blocks = (position[t] + n + Blocks::SIZE - 1) / Blocks::SIZE;
      Blocks::append_reading_order(block_table(t), n_blocks, halves_);
      t += n;
    }
    tiles_.push_back({count, 0, false, static_cast<int64_t>(halves_.size())});
  }

  int64_t n_tokens() const { return tokens_.n_tokens; }
  int64_t n_heads() const { return tokens_.n_heads; }
  int64_t n_tiles() const { return static_cast<int64_t>(tiles_.size()) - 1; }
  // Multiplications of queries with keys, and of weights with values.
  int64_t multiplications() const {
    int64_t keys = 0;
    for (int64_t t = 0; t < tokens_.n_tokens; t++) keys += tokens_.positions[t] + 1;
    return 2 * keys * tokens_.n_heads * tokens_.head_size;
  }
  // Tokens whose keys and values other tokens of this call may read: they are written first.
  const std::vector<int64_t>& shared_tokens() const { return shared_tokens_; }

  // Writes the key and value of a token to the cache.
  void write(int64_t token, int64_t h, const HeadQkv<T>& head) const {
    blocks_of(token, h).write(tokens_.positions[token], head.key(token), head.value(token),
                              tokens_.head_size, scratch());
  }

  // Prefetches what tiles [from, to) read of a head.
  BlockPrefetcher prefetcher(int64_t from, int64_t to, int64_t h) const {
    const int64_t half_bytes = Blocks::block_elements(padded_size_) *
                               static_cast<int64_t>(sizeof(typename Blocks::Element)) / 2;
    return BlockPrefetcher(cache_ + h * elements_per_head_, halves_.data(), half_bytes,
                           tiles_[from].first_half, tiles_[to].first_half);
  }

  // Lines to prefetch before tile `to` begins: all that earlier tiles read, and the distance.
  int64_t lines_before(int64_t to, const BlockPrefetcher& prefetcher) const {
    return prefetcher.lines_until(tiles_[to].first_half) + MIN_PREFETCH_DISTANCE;
  }

  // Computes tiles [from, to) of head h.
  void attend(int64_t from, int64_t to, int64_t h, const HeadQkv<T>& head,
              BlockPrefetcher& prefetcher) const {
    prefetcher.set_rate(tiles_[to].first_half - tiles_[from].first_half,
                        lines_before(to, prefetcher));
    for (int64_t i = from; i < to; i++) {
      if (tiles_[i].queries == MAX_QUERIES_PER_TILE) {
        attend_tile<MAX_QUERIES_PER_TILE>(tiles_[i], h, head, prefetcher);
      } else {
        attend_tile<1>(tiles_[i], h, head, prefetcher);
      }
    }
  }

 private:
  struct Tile {
    int64_t token, queries;  // MAX_QUERIES_PER_TILE consecutive positions of one sequence, or one
    bool is_alone;           // no other token of the call reads what this one writes
    int64_t first_half;      // index in halves_
  };

  static AttentionScratch& scratch() {
    static thread_local AttentionScratch of_thread;
    return of_thread;
  }

  const int32_t* block_table(int64_t token) const {
    return tokens_.block_table + tokens_.seq_indices[token] * tokens_.blocks_per_seq;
  }

  Blocks blocks_of(int64_t token, int64_t h) const {
    return Blocks(padded_size_, block_table(token), cache_ + h * elements_per_head_);
  }

  // A token that is alone is written here, just before it is read, while its block is cached.
  template <int Q>
  void attend_tile(const Tile& tile, int64_t h, const HeadQkv<T>& head,
                   BlockPrefetcher& prefetcher) const {
    static thread_local std::vector<float> sums;
    sums.resize(Q * padded_size_);
    float totals[Q];
    const int64_t token = tile.token, head_size = tokens_.head_size;
    const auto write_own = [&] {
      if (tile.is_alone) write(token, h, head);
    };
    blocks_of(token, h).template attend<Q>(head.query(token), head.stride, head_size, tokens_.scale,
                                           tokens_.positions[token] + 1, write_own, prefetcher,
                                           sums.data(), totals, scratch());
    for (int i = 0; i < Q; i++) {
      const float factor = 1.0f / totals[i];
      const float* from = sums.data() + i * padded_size_;
      T* to = out_ + ((token + i) * tokens_.n_heads + h) * head_size;
      for (int64_t d = 0; d < head_size; d += LANES)
        store(to + d, load(from + d) * factor, head_size - d);
    }
  }

  const PagedTokens& tokens_;
  int64_t padded_size_, elements_per_head_;
  typename Blocks::Element* cache_;
  T* out_;
  std::vector<Tile> tiles_;      // the last one marks the end
  std::vector<int32_t> halves_;  // half blocks in reading order
  std::vector<int64_t> shared_tokens_;
};

}  // namespace gptbatch
