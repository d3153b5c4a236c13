// Routed experts of different FFN widths on a CPU; ragged_moe_cpu.py compiles this file and calls it.
//
//   out[t] = sum over the experts e that token t chose of  weight[t, e] * down_e(silu(gate_e(x[t])) * up_e(x[t]))
//
// Weights are gate_up [2, rows, hidden_size] and down [rows, hidden_size]. A row is one channel, and expert e has the
// rows from offsets[e] to offsets[e + 1]. They are read where they lie: nothing is padded, no whole matrix is copied.
//
// This file sorts tokens by expert and divides the work among threads; ragged_moe_products.h multiplies. There are two
// ways, because what takes the time differs:
//
// - An expert with at most FEW tokens takes as long as reading its weights does. So its rows are read in the order in
//   which they lie in memory. Lines of memory are asked for one step ahead, since the CPU by itself stops looking ahead
//   at the end of each 4 KiB page, and a row is about one page.
// - An expert with more tokens takes as long as multiplying does. So a step has several tokens and several channels or
//   columns: as many as there are registers for their sums. What a step has loaded is used several times.
//
// Sums are float32. Their order depends neither on the number of threads nor on the other tokens, so a token's output
// has the same bits in every batch.

#include <omp.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "ragged_moe_products.h"

namespace {

constexpr int64_t FEW = 4;         // at this number of tokens both ways were equally fast
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

template <typename T>
class Layer {
 public:
  Layer(const T* gate_up, const T* down, int64_t rows, const int32_t* offsets, int64_t hidden_size, int64_t num_experts)
      : gate_(gate_up), up_(gate_up + rows * hidden_size), down_(down), offsets_(offsets), hidden_size_(hidden_size),
        num_experts_(num_experts), row_size_((hidden_size + PAIR - 1) / PAIR * PAIR),
        input_size_(row_size_ / NUMBERS<T>) {}

  void run(const T* x, const float* topk_weights, const int32_t* topk_ids, int64_t num_tokens, int64_t top_k, T* out) {
    sort(topk_weights, topk_ids, num_tokens * top_k, top_k);
    inputs_ = allocate<Word>(num_tokens * input_size_);
    outputs_ = allocate<float>(num_tokens * row_size_);
#pragma omp parallel
    {
#pragma omp for
      for (int64_t t = 0; t < num_tokens; ++t) {
        read_row(x + t * hidden_size_, inputs_.get() + t * input_size_);
        std::fill_n(outputs_.get() + t * row_size_, row_size_, 0.0f);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < int64_t(tasks_.size()); ++task) gate_and_up(tasks_[task]);
      // A thread has columns of its own, so that tokens need no locks.
      const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num(), units = row_size_ / PAIR;
      const int64_t start = units * thread / threads * PAIR, end = units * (thread + 1) / threads * PAIR;
      for (int64_t e = 0; e < num_experts_; ++e) add_down(e, start, std::min(end, hidden_size_));
#pragma omp barrier
#pragma omp for
      for (int64_t t = 0; t < num_tokens; ++t) narrow_row(outputs_.get() + t * row_size_, out + t * hidden_size_);
    }
  }

 private:
  struct Task {
    int64_t expert, start, end;  // channels
  };

  int64_t width(int64_t e) const { return offsets_[e + 1] - offsets_[e]; }

  // Words of a token's channels.
  int64_t words_of(int64_t channels) const { return (channels + NUMBERS<T> - 1) / NUMBERS<T>; }

  // Sorts choices by expert, those of one expert by token. An id that is no expert, such as -1, adds nothing, and
  // neither does an expert without channels.
  void sort(const float* topk_weights, const int32_t* topk_ids, int64_t count, int64_t top_k) {
    const auto exists = [&](int32_t id) { return id >= 0 && id < num_experts_ && width(id) > 0; };
    starts_.assign(num_experts_ + 1, 0);
    for (int64_t i = 0; i < count; ++i)
      if (exists(topk_ids[i])) ++starts_[topk_ids[i] + 1];
    int64_t hidden_size = 0;
    for (int64_t e = 0; e < num_experts_; ++e) {
      hidden_size += starts_[e + 1] * words_of(width(e));
      for (int64_t c = 0; starts_[e + 1] && c < width(e); c += CHANNELS)
        tasks_.push_back({e, c, std::min(c + CHANNELS, width(e))});
      starts_[e + 1] += starts_[e];
    }
    choices_.resize(starts_[num_experts_]);
    hidden_ = allocate<Word>(hidden_size);
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      if (exists(topk_ids[i])) choices_[next[topk_ids[i]]++] = {i / top_k, topk_weights[i], nullptr};
    Word* hidden = hidden_.get();
    for (int64_t e = 0; e < num_experts_; ++e)
      for (int64_t i = starts_[e]; i < starts_[e + 1]; ++i, hidden += words_of(width(e))) choices_[i].hidden = hidden;
  }

  void read_row(const T* from, Word* to) const {
    int64_t i = 0;
    const auto read = [&](const T* pair) {
      for (int vector = 0; vector < VECTORS<T>; ++vector)
        *reinterpret_cast<WordsAt*>(to + i / NUMBERS<T> + vector * LANES) = words(pair, vector);
    };
    for (; i + PAIR <= hidden_size_; i += PAIR) read(from + i);
    T end[PAIR] = {};
    if (i < hidden_size_) std::memcpy(end, from + i, (hidden_size_ - i) * sizeof(T)), read(end);
  }

  void narrow_row(const float* from, T* to) const {
    int64_t i = 0;
    for (; i + PAIR <= hidden_size_; i += PAIR) store(to + i, load(from + i));
    T end[PAIR];
    if (i < hidden_size_) store(end, load(from + i)), std::memcpy(to + i, end, (hidden_size_ - i) * sizeof(T));
  }

  void gate_and_up(const Task& task) {
    if (starts_[task.expert + 1] - starts_[task.expert] > FEW)
      gate_and_up<DOT_CHANNELS>(task);
    else
      gate_and_up<1>(task);
  }

  // The same, C channels a step.
  template <int C>
  void gate_and_up(const Task& task) {
    const T* gate = gate_ + (offsets_[task.expert] + task.start) * hidden_size_;
    const T* up = up_ + (offsets_[task.expert] + task.start) * hidden_size_;
    const int64_t channels = task.end - task.start, last = starts_[task.expert + 1];
    for (int64_t i = starts_[task.expert]; i < last; i += DOT_TOKENS)
      with_constant<DOT_TOKENS>(last - i, [&](auto M) {
        const Word* inputs[M.value];
        for (int m = 0; m < M.value; ++m) inputs[m] = inputs_.get() + choices_[i + m].token * input_size_;
        float gates[M.value * CHANNELS], ups[M.value * CHANNELS];
        int64_t c = 0;
        const auto multiply = [&](auto count) {
          dot<M.value, count.value>(inputs, gate + c * hidden_size_, up + c * hidden_size_, hidden_size_,
                                    gates + c, ups + c);
          c += count.value;
        };
        while (c + C <= channels) multiply(std::integral_constant<int, C>());
        while (c < channels) multiply(std::integral_constant<int, 1>());
        for (int m = 0; m < M.value; ++m) {
          float *g = gates + m * CHANNELS, *h = ups + m * CHANNELS;
          for (c = 0; c < channels; ++c) h[c] *= choices_[i + m].weight * g[c] / (1.0f + exponential(-g[c]));
          write_words<T>(h, channels, choices_[i + m].hidden + task.start / NUMBERS<T>);
        }
      });
  }

  // Adds the expert's outputs in columns from `first` to `last`. Both ways finish a block of rows for all tokens before
  // the next block. So a token that chose the expert twice gets its sums in the same order from both.
  void add_down(int64_t e, int64_t first, int64_t last) {
    constexpr int64_t block = STEPS * NUMBERS<T>;
    if (starts_[e + 1] - starts_[e] > FEW)
      for (int64_t row = 0; row < width(e); row += block)
        add_rows(e, row, std::min(block, width(e) - row), first, last);
    else
      for (int64_t row = 0; row < width(e); row += block)
        for_choices<FEW>(e, row, [&](const auto& hidden, const auto& outputs) {
          const T* down = down_ + (offsets_[e] + row) * hidden_size_;
          add_few(down, std::min(block, width(e) - row), hidden, outputs, first, last);
        });
  }

  // Calls `call` with up to MOST of the expert's choices at a time: where the channels of each are, from `row` on, and
  // where its token's outputs are. A token that chose the expert twice comes in two calls, as `add` needs.
  template <int MOST, typename Call>
  void for_choices(int64_t e, int64_t row, Call call) const {
    for (int64_t i = starts_[e], count; i < starts_[e + 1]; i += count) {
      const int64_t most = std::min<int64_t>(MOST, starts_[e + 1] - i);
      for (count = 1; count < most && choices_[i + count].token != choices_[i + count - 1].token;) ++count;
      with_constant<MOST>(count, [&](auto M) {
        std::array<const Word*, M.value> hidden;
        std::array<float*, M.value> outputs;
        for (int m = 0; m < M.value; ++m) {
          hidden[m] = choices_[i + m].hidden + row / NUMBERS<T>;
          outputs[m] = outputs_.get() + choices_[i + m].token * row_size_;
        }
        call(hidden, outputs);
      });
    }
  }

  // A few of the rows from `down` on at a time, all columns of each.
  template <size_t M>
  void add_few(const T* down, int64_t rows, std::array<const Word*, M> hidden, const std::array<float*, M>& outputs,
               int64_t first, int64_t last) const {
    const auto add_steps = [&](auto steps) {
      constexpr int64_t taken = steps.value * NUMBERS<T>;
      const auto add_columns = [&](int64_t column, int64_t count) {
        Panel<1> panel[steps.value];
        pack<1>(down + column, rows, hidden_size_, count, taken * hidden_size_, steps.value, panel);
        add<1, T>(hidden, panel, steps.value, outputs, column);
      };
      int64_t column = first;
      for (; column + PAIR <= last; column += PAIR) add_columns(column, PAIR);
      if (column < last) add_columns(column, last - column);
      for (auto& channels : hidden) channels += steps.value;
      down += taken * hidden_size_, rows -= taken;
    };
    while (rows >= ROWS) add_steps(std::integral_constant<int, ROWS / NUMBERS<T>>());
    while (rows > 0) add_steps(std::integral_constant<int, 1>());
  }

  // As many rows as a panel has, a few columns at a time.
  void add_rows(int64_t e, int64_t row, int64_t rows, int64_t first, int64_t last) const {
    const T* down = down_ + (offsets_[e] + row) * hidden_size_;
    const int steps = words_of(rows);
    int64_t column = first;
    const auto add_columns = [&](auto pairs) {
      constexpr int P = pairs.value;
      alignas(CACHE_LINE) Panel<P> panel[STEPS];
      pack<P>(down + column, rows, hidden_size_, last - column, P * PAIR, steps, panel);
      for_choices<ADD_TOKENS>(e, row, [&](const auto& hidden, const auto& outputs) {
        add<P, T>(hidden, panel, steps, outputs, column);
      });
      column += P * PAIR;
    };
    while (column + (ADD_PAIRS - 1) * PAIR < last) add_columns(std::integral_constant<int, ADD_PAIRS>());
    while (column < last) add_columns(std::integral_constant<int, 1>());
  }

  const T *gate_, *up_, *down_;
  const int32_t* offsets_;
  int64_t hidden_size_, num_experts_;
  int64_t row_size_, input_size_;  // of a token: columns, rounded up to PAIR, and their words
  std::vector<Task> tasks_;
  std::vector<int64_t> starts_;  // [experts + 1]: where an expert's choices begin
  std::vector<Choice> choices_;
  Buffer<Word> hidden_, inputs_;
  Buffer<float> outputs_;
};

template <typename T>
int run(const void* x, const void* gate_up, const void* down, const int32_t* offsets, const float* topk_weights,
        const int32_t* topk_ids, void* out, int64_t num_tokens, int64_t hidden_size, int64_t rows, int64_t num_experts,
        int64_t top_k) try {
  Layer<T>(static_cast<const T*>(gate_up), static_cast<const T*>(down), rows, offsets, hidden_size, num_experts)
      .run(static_cast<const T*>(x), topk_weights, topk_ids, num_tokens, top_k, static_cast<T*>(out));
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // namespace

// Tensors are contiguous and in CPU memory; x and out are [num_tokens, hidden_size], topk_weights and topk_ids
// [num_tokens, top_k], offsets [num_experts + 1], none above `rows`. Returns 1 when memory ran out.
#define RAGGED_MOE(name, type)                                                                                        \
  extern "C" int ragged_moe_##name(const void* x, const void* gate_up, const void* down, const int32_t* offsets,      \
                                   const float* topk_weights, const int32_t* topk_ids, void* out, int64_t num_tokens, \
                                   int64_t hidden_size, int64_t rows, int64_t num_experts, int64_t top_k) {           \
    return run<type>(x, gate_up, down, offsets, topk_weights, topk_ids, out, num_tokens, hidden_size, rows,           \
                     num_experts, top_k);                                                                             \
  }
RAGGED_MOE(float32, float)
RAGGED_MOE(bfloat16, BFloat16)
RAGGED_MOE(float16, Float16)
