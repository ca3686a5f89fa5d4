// The tokens of one call of attention: which queries go over the pages together, what each token adds to the cache, and what it gets.

#pragma once

#include <vector>

#include "attention.h"

namespace gptbatch {

// Where the queries, keys and values of one head are: those of token t begin at numbers + t * stride, `part` numbers from one another.
template <class T>
struct Head {
  const T* numbers;
  int64_t stride, part;

  const T* query(int64_t token) const { return numbers + token * stride; }
  const T* key(int64_t token) const { return query(token) + part; }
  const T* value(int64_t token) const { return key(token) + part; }
};

// T: the type of queries, keys, values and of what comes out; Pages: how the cache keeps them.
template <class T, class Pages>
class Tokens {
 public:
  // Of attention.cpp's arguments; out (R, H D) is written by `paged_attention`, but for the rows that belong to nobody, which become 0 here.
  Tokens(at::Tensor& cache, const at::Tensor& pages, const at::Tensor& slots, const at::Tensor& positions, double scale, at::Tensor& out)
      : count_(slots.size(0)),
        heads_(cache.size(0)),
        head_size_(out.size(1) / cache.size(0)),
        depth_((head_size_ + 31) / 32 * 32),
        pages_of_head_(cache.size(1) * cache.size(2)),
        most_pages_(pages.size(1)),
        slot_(slots.const_data_ptr<int64_t>()),
        position_(positions.const_data_ptr<int64_t>()),
        table_(pages.const_data_ptr<int32_t>()),
        cache_(cache.data_ptr<typename Pages::Number>()),
        scale_(static_cast<float>(scale)),
        out_(out.data_ptr<T>()) {
    TORCH_CHECK(cache.size(2) == Pages::page_numbers(depth_), "paged_attention: the pages of the cache are of another size");
    for (int64_t t = 0; t < count_;) {
      int64_t n = 1;
      while (n < QUERIES && t + n < count_ && slot_[t + n] == slot_[t] && position_[t + n] == position_[t] + n) n++;
      n = n == QUERIES ? n : 1;
      // a page that is not whole yet is nobody else's
      const bool unfinished = position_[t] % Pages::SIZE != Pages::SIZE - 1;
      const bool alone = n == 1 && unfinished && (t == 0 || slot_[t - 1] != slot_[t]) && (t + 1 == count_ || slot_[t + 1] != slot_[t]);
      if (!alone)
        for (int64_t i = 0; i < n; i++) early_.push_back(t + i);
      tiles_.push_back({t, n, alone, static_cast<int64_t>(halves_.size())});
      Pages::order(table_ + slot_[t] * most_pages_, (position_[t] + n + Pages::SIZE - 1) / Pages::SIZE, halves_);
      t += n;
    }
    tiles_.push_back({count_, 0, false, static_cast<int64_t>(halves_.size())});
    std::fill(out_ + count_ * heads_ * head_size_, out_ + out.numel(), T(0));
  }

  int64_t count() const { return count_; }
  int64_t heads() const { return heads_; }
  int64_t tiles() const { return static_cast<int64_t>(tiles_.size()) - 1; }
  // Multiplications of all queries with keys, and of weights with values.
  int64_t multiplications() const {
    int64_t keys = 0;
    for (int64_t t = 0; t < count_; t++) keys += position_[t] + 1;
    return 2 * keys * heads_ * head_size_;
  }
  // Tokens whose keys and values others may read in this call: they are to be written first.
  const std::vector<int64_t>& early() const { return early_; }

  // Writes what a token adds to the cache.
  void write(int64_t token, int64_t h, const Head<T>& head) const {
    pages_of(token, h).write(position_[token], head.key(token), head.value(token), head_size_, scratch());
  }

  // What the tiles from `from` to before `to` read of a head.
  Lookahead lookahead(int64_t from, int64_t to, int64_t h) const {
    const int64_t half_bytes = Pages::page_numbers(depth_) * static_cast<int64_t>(sizeof(typename Pages::Number)) / 2;
    return Lookahead(cache_ + h * pages_of_head_, halves_.data(), half_bytes, tiles_[from].first_half, tiles_[to].first_half);
  }

  // Lines that are to be asked for before tile `to` begins: all before it, and some more.
  int64_t lines_before(int64_t to, const Lookahead& ahead) const { return ahead.lines_to(tiles_[to].first_half) + LEAD; }

  // Attends for the tiles from `from` to before `to`.
  void attend(int64_t from, int64_t to, int64_t h, const Head<T>& head, Lookahead& ahead) const {
    ahead.set_pace(tiles_[to].first_half - tiles_[from].first_half, lines_before(to, ahead));
    for (int64_t i = from; i < to; i++) {
      if (tiles_[i].queries == QUERIES) {
        attend<QUERIES>(tiles_[i], h, head, ahead);
      } else {
        attend<1>(tiles_[i], h, head, ahead);
      }
    }
  }

 private:
  struct Tile {
    int64_t token, queries;  // QUERIES tokens at consecutive positions of one slot, or one
    bool alone;              // nobody else in the call reads what its token adds to the cache
    int64_t first_half;      // of pages, where those that it reads begin
  };

  static Scratch& scratch() {
    static thread_local Scratch kept;
    return kept;
  }

  Pages pages_of(int64_t token, int64_t h) const { return Pages(depth_, table_ + slot_[token] * most_pages_, cache_ + h * pages_of_head_); }

  // A token that no other reads from is written here, and is found in the CPU's cache.
  template <int Q>
  void attend(const Tile& tile, int64_t h, const Head<T>& head, Lookahead& ahead) const {
    static thread_local std::vector<float> mixed;
    mixed.resize(Q * depth_);
    float totals[Q];
    const int64_t token = tile.token;
    const auto write_own = [&] {
      if (tile.alone) write(token, h, head);
    };
    pages_of(token, h).template attend<Q>(head.query(token), head.stride, head_size_, scale_, position_[token] + 1, write_own, ahead,
                                          mixed.data(), totals, scratch());
    for (int i = 0; i < Q; i++) {
      const Vec factor(1.0f / totals[i]);
      for (int64_t d = 0; d < head_size_; d += 2 * LANES) {
        const float* from = mixed.data() + i * depth_ + d;
        const Vec low = Vec::loadu(from) * factor, high = Vec::loadu(from + LANES) * factor;
        const int64_t numbers = std::min(2 * LANES, head_size_ - d);
        T* to = out_ + ((token + i) * heads_ + h) * head_size_ + d;
        if constexpr (std::is_same_v<T, float>) {
          low.store(to, std::min(LANES, numbers));
          if (numbers > LANES) high.store(to + LANES, numbers - LANES);
        } else {
          at::vec::convert_from_float<T>(low, high).store(to, numbers);
        }
      }
    }
  }

  int64_t count_, heads_, head_size_, depth_, pages_of_head_, most_pages_;
  const int64_t *slot_, *position_;
  const int32_t* table_;
  typename Pages::Number* cache_;
  float scale_;
  T* out_;
  std::vector<Tile> tiles_;  // and one that stands for their end
  std::vector<int32_t> halves_;
  std::vector<int64_t> early_;
};

}  // namespace gptbatch
