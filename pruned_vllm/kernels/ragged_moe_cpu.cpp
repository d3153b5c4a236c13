// Routed experts of different FFN widths on a CPU; ragged_moe_cpu.py compiles this file and calls it.
//
//   out[t] = sum over the experts e that token t chose of  weight[t, e] * down_e(silu(gate_e(x[t])) * up_e(x[t]))
//
// Compiled with -DGENERAL it has biases and other activations, too: see ragged_moe_epilogues.h.
//
// Weights are gate_up [2, rows, hidden_size] and down [rows, hidden_size]. A row is one channel, and expert e has the
// rows from offsets[e] to offsets[e + 1]. They are read where they lie: nothing is padded, no whole matrix is copied.
// They are numbers like x, or codes of 8 or 4 bits with scales (WEIGHTS, see ragged_moe_readers.h), which are widened
// in registers: a row of gate or up has a scale for each group of columns, and down has scales [runs, hidden_size], one
// for each column of a run of an expert's rows.
//
// This file divides the work among threads; ragged_moe_products.h multiplies. There are two ways, because what takes
// the time differs:
//
// - An expert with at most FEW tokens takes as long as reading its weights does. So its rows are read in the order in
//   which they lie in memory. Lines of memory are asked for one step ahead, in that order, since most CPUs by
//   themselves stop looking ahead at the end of each 4 KiB page, and a row is about one page; see `are_asked_for`.
// - An expert with more tokens takes as long as multiplying does. So a step has several tokens and several channels or
//   columns: as many as there are registers for their sums. What a step has loaded is used several times, and codes are
//   widened once for all tokens.
//
// Sums are float32. Their order depends neither on the number of threads nor on the other tokens, so a token's output
// has the same bits in every batch.

#include <omp.h>

#include "ragged_moe_choices.h"
#include "ragged_moe_epilogues.h"
#include "ragged_moe_products.h"
#include "ragged_moe_weights.h"

namespace {

template <typename T, typename W>
class Layer : Epilogue {
 public:
  Layer(const Weights<W>& weights, const Extras* extras)
      : Epilogue(extras), weights_(weights), hidden_size_(weights.hidden_size), run_(weights.rows_of_run()),
        layout_(Layout::of<T, W>(hidden_size_, weights.group_size ? weights.group_size : hidden_size_)),
        input_size_(layout_.input_size()), row_size_((hidden_size_ + PAIR - 1) / PAIR * PAIR) {}

  void run(const T* x, const float* topk_weights, const int32_t* topk_ids, int64_t num_tokens, int64_t top_k, T* out) {
    const Choices choices(topk_weights, topk_ids, num_tokens * top_k, top_k, weights_.num_experts,
                          [&](int64_t e) { return words_before(weights_.width(e)); });
    const std::vector<Task> tasks = tasks_of(choices);
    inputs_ = allocate<Word>(num_tokens * input_size_);
    outputs_ = allocate<float>(num_tokens * row_size_);
    if constexpr (SCALED) {
      unscaled_ = allocate<float>(FEW * row_size_);
      if (choices.most() > FEW) widened_ = allocate<Word>(omp_get_max_threads() * WIDENED_ROWS * input_size_);
    }
#pragma omp parallel
    {
#pragma omp for
      for (int64_t t = 0; t < num_tokens; ++t) {
        read_row(x + t * hidden_size_, inputs_.get() + t * input_size_);
        std::fill_n(outputs_.get() + t * row_size_, row_size_, 0.0f);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < int64_t(tasks.size()); ++task) gate_and_up(choices, tasks[task]);
      // A thread has columns of its own, so that tokens need no locks.
      const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num(), units = row_size_ / PAIR;
      const int64_t start = units * thread / threads * PAIR, end = units * (thread + 1) / threads * PAIR;
      if (down_bias) add_down_biases(topk_weights, topk_ids, num_tokens, top_k, start, std::min(end, hidden_size_));
      for (const int64_t e : choices.experts()) add_down(choices, e, start, std::min(end, hidden_size_));
#pragma omp barrier
#pragma omp for
      for (int64_t t = 0; t < num_tokens; ++t) narrow_row(outputs_.get() + t * row_size_, out + t * hidden_size_);
    }
  }

 private:
  static constexpr bool SCALED = !std::is_same_v<T, W>;
  // At this number of an expert's tokens both ways were about equally fast. The second has codes to widen.
  static constexpr int64_t FEW = SCALED ? 8 : 4;
  static constexpr int64_t WIDENED_ROWS = 2 * CHANNELS;

  // Channels of an expert, all in one run.
  struct Task {
    int64_t expert, start, end;
  };

  // Words of the first `channels` channels of an expert; a run begins with a new word.
  int64_t words_before(int64_t channels) const {
    return channels / run_ * words_of(run_) + words_of(channels % run_);
  }

  int64_t words_of(int64_t channels) const { return (channels + NUMBERS<T> - 1) / NUMBERS<T>; }

  std::vector<Task> tasks_of(const Choices& choices) const {
    std::vector<Task> tasks;
    for (const int64_t e : choices.experts())
      for (int64_t start = 0, end; start < weights_.width(e); start = end)
        tasks.push_back({e, start, end = std::min(start + CHANNELS, weights_.run_end(e, start))});
    return tasks;
  }

  void read_row(const T* from, Word* to) const {
    for (int64_t group = 0; group < layout_.groups; ++group, from += layout_.columns, to += layout_.group_words) {
      using R = Reader<T, W>;
      const T* const rows[] = {from};
      for_steps<R::STEP, 1>(rows, layout_.columns, layout_.columns, 0, [&](int64_t k, const auto& inputs) {
        const T* step = inputs(0);
        T ordered[R::STEP];
        if constexpr (SCALED) {
          for (int i = 0; i < R::STEP; ++i) ordered[i] = step[R::input_column(i)];
          step = ordered;
        }
        for (int vector = 0; vector < R::VECTORS; ++vector)
          *reinterpret_cast<WordsAt*>(to + k / NUMBERS<T> + vector * LANES) =
              words(step + vector / VECTORS<T> * PAIR, vector % VECTORS<T>);
      });
    }
  }

  void narrow_row(const float* from, T* to) const {
    int64_t i = 0;
    for (; i + PAIR <= hidden_size_; i += PAIR) store(to + i, load(from + i));
    T end[PAIR];
    if (i < hidden_size_) store(end, load(from + i)), std::memcpy(to + i, end, (hidden_size_ - i) * sizeof(T));
  }

  void gate_and_up(const Choices& choices, const Task& task) {
    const int64_t row = weights_.offsets[task.expert] + task.start, count = task.end - task.start;
    const W *gate = weights_.gate_up + row * layout_.row_size, *up = gate + weights_.rows * layout_.row_size;
    if (choices.count(task.expert) <= FEW) {
      if (asks_)
        gate_and_up<1>(choices, task, gate, up, layout_);
      else
        gate_and_up<2>(choices, task, gate, up, layout_);
    } else if constexpr (!SCALED) {
      gate_and_up<DOT_CHANNELS>(choices, task, gate, up, layout_);
    } else {
      Word* wide_gate = widened_.get() + omp_get_thread_num() * WIDENED_ROWS * input_size_;
      Word* wide_up = wide_gate + CHANNELS * input_size_;
      for (int64_t c = 0; c < count; ++c) {
        widen_row<T>(gate + c * layout_.row_size, layout_, wide_gate + c * input_size_);
        widen_row<T>(up + c * layout_.row_size, layout_, wide_up + c * input_size_);
      }
      const Word *const_gate = wide_gate, *const_up = wide_up;
      gate_and_up<DOT_CHANNELS>(choices, task, const_gate, const_up, layout_.of_words<T>());
    }
  }

  // The same, C channels a step, for rows as they are stored or widened.
  template <int C, typename E>
  void gate_and_up(const Choices& choices, const Task& task, const E* gate, const E* up, const Layout& layout) const {
    const float* gate_scales = weights_.gate_up_scales;
    const float* up_scales = gate_scales;
    if constexpr (SCALED) {
      gate_scales += (weights_.offsets[task.expert] + task.start) * layout.groups;
      up_scales = gate_scales + weights_.rows * layout.groups;
    }
    const Choice* choice = choices.of(task.expert);
    const int64_t channels = task.end - task.start, count = choices.count(task.expert);
    for (int64_t i = 0; i < count; i += DOT_TOKENS)
      with_constant<DOT_TOKENS>(count - i, [&](auto M) {
        const Word* inputs[M.value];
        for (int m = 0; m < M.value; ++m) inputs[m] = inputs_.get() + choice[i + m].token * input_size_;
        float gates[M.value * CHANNELS], ups[M.value * CHANNELS];
        int64_t c = 0;
        const auto multiply = [&](auto together) {
          dot<M.value, together.value, T>(inputs, gate + c * layout.row_size, up + c * layout.row_size, layout,
                                          gate_scales + c * layout.groups, up_scales + c * layout.groups, gates + c,
                                          ups + c);
          c += together.value;
        };
        while (c + C <= channels) multiply(std::integral_constant<int, C>());
        while (c < channels) multiply(std::integral_constant<int, 1>());
        for (int m = 0; m < M.value; ++m) {
          float *g = gates + m * CHANNELS, *h = ups + m * CHANNELS;
          combine(choice[i + m].weight, weights_, task.expert, task.start, channels, g, h);
          write_words<T>(h, channels, choice[i + m].hidden + words_before(task.start));
        }
      });
  }

  // Adds the biases of down of all chosen experts, also of those without channels, in columns from `first` to `last`.
  void add_down_biases(const float* topk_weights, const int32_t* topk_ids, int64_t num_tokens, int64_t top_k,
                       int64_t first, int64_t last) const {
    for (int64_t i = 0; i < num_tokens * top_k; ++i) {
      if (topk_ids[i] < 0 || topk_ids[i] >= weights_.num_experts) continue;
      const float* bias = down_bias + topk_ids[i] * hidden_size_;
      float* output = outputs_.get() + i / top_k * row_size_;
      const Pair weight = {Floats{} + topk_weights[i], Floats{} + topk_weights[i]};
      for (int64_t column = first; column < last; column += PAIR)
        add_scaled(output + column, weight, load_scales<T>(bias + column, last - column));
    }
  }

  // Adds the expert's outputs in columns from `first` to `last`. Both ways finish a block of rows for all tokens before
  // the next block. So a token that chose the expert twice gets its sums in the same order from both. A block is all in
  // one run, and scaled as a whole.
  void add_down(const Choices& choices, int64_t e, int64_t first, int64_t last) {
    constexpr int64_t block = STEPS * NUMBERS<T>;
    for (int64_t row = 0, end; row < weights_.width(e); row = end) {
      end = std::min(row + block, weights_.run_end(e, row));
      const W* down = weights_.down + (weights_.offsets[e] + row) * layout_.row_size;
      const float* scales = nullptr;
      if constexpr (SCALED) scales = weights_.down_scales + (weights_.down_offsets[e] + row / run_) * hidden_size_;
      const auto for_choices = [&](auto most, auto call) {
        choices.for_each<most.value>(e, words_before(row), outputs_.get(), row_size_, call);
      };
      if (choices.count(e) > FEW)
        add_rows(down, scales, end - row, first, last, for_choices);
      else
        for_choices(std::integral_constant<int, FEW>(), [&](const auto& hidden, const auto& outputs) {
          add_few(down, scales, end - row, hidden, outputs, first, last);
        });
    }
  }

  // Rows from `down` on, for a few tokens.
  template <size_t M>
  void add_few(const W* down, const float* scales, int64_t rows, const std::array<const Word*, M>& hidden,
               const std::array<float*, M>& outputs, int64_t first, int64_t last) const {
    if constexpr (!SCALED) {
      add_few(down, rows, hidden, outputs, first, last);
    } else {
      std::array<float*, M> sums;
      for (size_t m = 0; m < M; ++m) {
        sums[m] = unscaled_.get() + m * row_size_;
        std::fill(sums[m] + first, sums[m] + (last + PAIR - 1) / PAIR * PAIR, 0.0f);
      }
      add_few(down, rows, hidden, sums, first, last);
      for (int64_t column = first; column < last; column += PAIR) {
        const Pair scale = load_scales<T>(scales + column, last - column);
        for (size_t m = 0; m < M; ++m) add_scaled(outputs[m] + column, scale, load(sums[m] + column));
      }
    }
  }

  // The same without scales: a few of the rows at a time, all columns of each.
  template <size_t M>
  void add_few(const W* down, int64_t rows, std::array<const Word*, M> hidden, std::array<float*, M> outputs,
               int64_t first, int64_t last) const {
    constexpr int COLUMNS = Reader<T, W>::COLUMNS;
    const int64_t row_size = layout_.row_size;
    const auto add_steps = [&](auto steps) {
      constexpr int64_t taken = steps.value * NUMBERS<T>;
      const W* ahead = down + taken * row_size + first / COLUMNS;
      Lines lines(ahead, (last - first) / COLUMNS * sizeof(W), row_size * sizeof(W));
      const auto add_columns = [&](int64_t column, int64_t count) {
        Panel<1> panel[steps.value];
        if (asks_) lines.ask(taken * PAIR / COLUMNS * sizeof(W));
        pack<1, false, T>(down + column / COLUMNS, rows, row_size, count, steps.value, panel);
        add<1, T>(hidden, panel, steps.value, outputs, column);
      };
      int64_t column = first;
      for (; column + PAIR <= last; column += PAIR) add_columns(column, PAIR);
      if (column < last) add_columns(column, last - column);
      for (auto& channels : hidden) channels += steps.value;
      down += taken * row_size, rows -= taken;
    };
    while (rows >= ROWS) add_steps(std::integral_constant<int, ROWS / NUMBERS<T>>());
    while (rows > 0) add_steps(std::integral_constant<int, 1>());
  }

  // As many rows as a panel has, a few columns at a time.
  template <typename ForChoices>
  void add_rows(const W* down, const float* scales, int64_t rows, int64_t first, int64_t last,
                const ForChoices& for_choices) const {
    constexpr int COLUMNS = Reader<T, W>::COLUMNS;
    const int steps = words_of(rows);
    int64_t column = first;
    const auto add_columns = [&](auto pairs) {
      constexpr int P = pairs.value;
      alignas(CACHE_LINE) Panel<P> panel[STEPS];
      pack<P, true, T>(down + column / COLUMNS, rows, layout_.row_size, last - column, steps, panel);
      Pair scale[P];
      if constexpr (SCALED)
        for (int p = 0; p < P; ++p) scale[p] = load_scales<T>(scales + column + p * PAIR, last - column - p * PAIR);
      for_choices(std::integral_constant<int, ADD_TOKENS>(), [&](const auto& hidden, const auto& outputs) {
        if constexpr (SCALED)
          add_scaled<P, T>(hidden, panel, steps, scale, outputs, column);
        else
          add<P, T>(hidden, panel, steps, outputs, column);
      });
      column += P * PAIR;
    };
    while (column + (ADD_PAIRS - 1) * PAIR < last) add_columns(std::integral_constant<int, ADD_PAIRS>());
    while (column < last) add_columns(std::integral_constant<int, 1>());
  }

  const Weights<W>& weights_;
  const int64_t hidden_size_, run_;  // run_: rows of down with the same scales
  const Layout layout_;
  const bool asks_ = are_asked_for<W>(layout_.row_size);  // before it reads rows for few tokens
  const int64_t input_size_, row_size_;  // of a token: words of the input; columns, rounded up to PAIR
  Buffer<Word> inputs_, widened_;        // widened_: WIDENED_ROWS for each thread, where experts have many tokens
  Buffer<float> outputs_, unscaled_;     // unscaled_: rows of sums for FEW tokens
};

#ifdef WEIGHTS
template <typename T>
using Stored = WEIGHTS;
#else
template <typename T>
using Stored = T;
#endif

}  // namespace

// Tensors are contiguous and in CPU memory; x and out are [num_tokens, hidden_size], topk_weights and topk_ids
// [num_tokens, top_k], offsets [num_experts + 1]. Scales are null for weights like x; extras are read with -DGENERAL
// alone. Returns 1 when memory ran out, and 2 where an expert's rows are not among the `rows` of weights, or its runs
// of scales not among the `runs` of down.
#define RAGGED_MOE(name, T)                                                                                           \
  extern "C" int ragged_moe_##name(const void* x, const void* gate_up, const void* down, const int32_t* offsets,      \
                                   const float* gate_up_scales, const float* down_scales,                             \
                                   const int32_t* down_offsets, const float* topk_weights, const int32_t* topk_ids,   \
                                   void* out, const Extras* extras, int64_t num_tokens, int64_t hidden_size,          \
                                   int64_t rows, int64_t runs, int64_t num_experts, int64_t top_k,                    \
                                   int64_t group_size) try {                                                          \
    using W = Stored<T>;                                                                                              \
    const Weights<W> weights{static_cast<const W*>(gate_up), static_cast<const W*>(down), offsets, gate_up_scales,    \
                             down_scales, down_offsets, rows, runs, num_experts, hidden_size, group_size};            \
    if (!weights.are_there()) return 2;                                                                               \
    Layer<T, W>(weights, extras)                                                                                      \
        .run(static_cast<const T*>(x), topk_weights, topk_ids, num_tokens, top_k, static_cast<T*>(out));              \
    return 0;                                                                                                         \
  } catch (const std::bad_alloc&) {                                                                                   \
    return 1;                                                                                                         \
  }
RAGGED_MOE(float32, float)
RAGGED_MOE(bfloat16, BFloat16)
RAGGED_MOE(float16, Float16)
