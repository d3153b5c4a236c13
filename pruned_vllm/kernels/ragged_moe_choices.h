// Which tokens chose which expert, and memory; ragged_moe_cpu.cpp includes this.

#pragma once

#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "ragged_moe_vectors.h"

constexpr size_t CACHE_LINE = 64;  // bytes

// Calls `call` with a number, 1 to MOST, as a constant.
template <int MOST, typename Call>
inline void with_constant(int64_t number, Call call) {
  if constexpr (MOST > 1)
    if (number < MOST) return with_constant<MOST - 1>(number, call);
  call(std::integral_constant<int, MOST>());
}

// Uninitialised memory that begins with a cache line. Vectors that straddle two lines nearly halve the speed of `dot`.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename N>
using Buffer = std::unique_ptr<N, Free>;

template <typename N>
Buffer<N> allocate(int64_t count) {
  const size_t bytes = (count * sizeof(N) / CACHE_LINE + 1) * CACHE_LINE;
  Buffer<N> buffer(static_cast<N*>(std::aligned_alloc(CACHE_LINE, bytes)));
  if (!buffer) throw std::bad_alloc();
  return buffer;
}

// One expert that a token was sent to.
struct Choice {
  int64_t token;
  float weight;
  Word* hidden;  // weight * silu(gate) * up of each of the expert's channels
};

// Choices sorted by expert, those of one expert by token.
class Choices {
 public:
  // An id that is no expert, such as -1, adds nothing, and neither does an expert without channels. `words_of` says how
  // many words the channels of an expert are.
  template <typename Size>
  Choices(const float* topk_weights, const int32_t* topk_ids, int64_t count, int64_t top_k, int64_t num_experts,
          Size words_of)
      : starts_(num_experts + 1) {
    const auto exists = [&](int32_t id) { return id >= 0 && id < num_experts && words_of(id) > 0; };
    for (int64_t i = 0; i < count; ++i)
      if (exists(topk_ids[i])) ++starts_[topk_ids[i] + 1];
    int64_t words = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
      if (starts_[e + 1]) experts_.push_back(e);
      words += starts_[e + 1] * words_of(e);
      most_ = std::max(most_, starts_[e + 1]);
      starts_[e + 1] += starts_[e];
    }
    choices_.resize(starts_[num_experts]);
    hidden_ = allocate<Word>(words);
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      if (exists(topk_ids[i])) choices_[next[topk_ids[i]]++] = {i / top_k, topk_weights[i], nullptr};
    Word* hidden = hidden_.get();
    for (const int64_t e : experts_)
      for (int64_t i = starts_[e]; i < starts_[e + 1]; ++i, hidden += words_of(e)) choices_[i].hidden = hidden;
  }

  const std::vector<int64_t>& experts() const { return experts_; }  // those that were chosen
  int64_t count(int64_t e) const { return starts_[e + 1] - starts_[e]; }
  int64_t most() const { return most_; }  // choices of one expert
  const Choice* of(int64_t e) const { return choices_.data() + starts_[e]; }

  // Calls `call` with up to MOST of the expert's choices at a time: where the channels of each are, from `word` on, and
  // where its token's outputs are. A token that chose the expert twice comes in two calls, as `add` needs.
  template <int MOST, typename Call>
  void for_each(int64_t e, int64_t word, float* outputs, int64_t row_size, Call call) const {
    const Choice* choices = of(e);
    for (int64_t i = 0, taken; i < count(e); i += taken) {
      const int64_t most = std::min<int64_t>(MOST, count(e) - i);
      for (taken = 1; taken < most && choices[i + taken].token != choices[i + taken - 1].token;) ++taken;
      with_constant<MOST>(taken, [&](auto M) {
        std::array<const Word*, M.value> hidden;
        std::array<float*, M.value> rows;
        for (int m = 0; m < M.value; ++m) {
          hidden[m] = choices[i + m].hidden + word;
          rows[m] = outputs + choices[i + m].token * row_size;
        }
        call(hidden, rows);
      });
    }
  }

 private:
  std::vector<int64_t> starts_;  // [experts + 1]: where an expert's choices begin
  std::vector<int64_t> experts_;
  int64_t most_ = 0;
  std::vector<Choice> choices_;
  Buffer<Word> hidden_;
};
