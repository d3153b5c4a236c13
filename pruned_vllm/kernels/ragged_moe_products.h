// The two products of ragged_moe_cpu.cpp: `dot` is for gate and up, `pack` and `add` are for down.

#pragma once

#include <array>

#include "ragged_moe_readers.h"

constexpr int CHANNELS = 24;  // of gate and up, at most, are one task of a thread
constexpr int ROWS = 4;       // of down are added at once to few tokens
constexpr int STEPS = 64;     // of one or two rows of down are added at once to more tokens
constexpr int AHEAD = 4096;   // bytes of gate and up, at least, are asked for before they are multiplied
constexpr int PAGE = 4096;    // bytes

// What shares a step. Its sums take up most of the 32 registers of AVX-512, and at least half of the 16 of other CPUs.
#ifdef __AVX512F__
constexpr int DOT_TOKENS = 4, DOT_CHANNELS = 3, ADD_TOKENS = 6, ADD_PAIRS = 2;
#else
constexpr int DOT_TOKENS = 4, DOT_CHANNELS = 1, ADD_TOKENS = 6, ADD_PAIRS = 1;
#endif

// Whether rows are asked for before they are read. Not where a CPU with AVX2 alone reads float32 rows of a page or
// more: it looks ahead along several rows by itself, and an AMD EPYC read 15 to 20 % faster unasked, with two channels
// of gate and up at once. With shorter rows, and with types that keep it busy computing, it was slower so.
template <typename W>
inline bool are_asked_for([[maybe_unused]] int64_t row_size) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return !std::is_same_v<W, float> || row_size * int64_t(sizeof(W)) < PAGE;
#else
  return true;
#endif
}

// How a row of gate or up lies in memory, and an input beside it: in groups of columns that have one scale. Without
// scales a row is one group.
struct Layout {
  int64_t row_size, groups;                    // elements of a row, groups of a row
  int64_t columns, group_size, group_words;    // of a group: columns, elements, words of the input

  // Of rows of W. A group of the input ends with zeros where W is read beyond it.
  template <typename T, typename W>
  static Layout of(int64_t row_columns, int64_t columns) {
    using R = Reader<T, W>;
    return {row_columns / R::COLUMNS, row_columns / columns, columns, columns / R::COLUMNS,
            (columns + R::STEP - 1) / R::STEP * R::STEP / NUMBERS<T>};
  }

  int64_t input_size() const { return groups * group_words; }  // words

  // Of rows that are words like the input.
  template <typename T>
  Layout of_words() const {
    return {input_size(), groups, group_words * NUMBERS<T>, group_words, group_words};
  }
};

// Reads `columns` columns of N rows, STEP at a time, PER_ELEMENT in an element. Calls `use` with the first column of a
// step and with a function that says where it lies in a row. A last step that is not full ends with what follows in the
// row, where `readable` columns are there, else with zeros. What lies `ahead` elements further is asked for.
template <int STEP, int PER_ELEMENT, int N, typename E, typename Use>
inline void for_steps(const E* const (&rows)[N], int64_t columns, int64_t readable, int64_t ahead, Use use) {
  int64_t k = 0;
  for (const int64_t last = std::min(columns - 1, readable - STEP); k <= last; k += STEP) {
    for (int row = 0; row < N; ++row) __builtin_prefetch(rows[row] + k / PER_ELEMENT + ahead);
    use(k, [&](int row) { return rows[row] + k / PER_ELEMENT; });
  }
  if (k < columns) {
    E ends[N][STEP / PER_ELEMENT] = {};
    for (int row = 0; row < N; ++row)
      std::memcpy(ends[row], rows[row] + k / PER_ELEMENT, (columns - k) / PER_ELEMENT * sizeof(E));
    use(k, [&](int row) { return ends[row]; });
  }
}

// Adds the products of M inputs and C rows of gate and of up, which take turns in `rows`. Where weights are codes,
// inputs end with zeros.
template <int M, int C, typename T, typename W>
inline void multiply(const Word* const (&inputs)[M], const W* const (&rows)[2 * C], int64_t columns, int64_t readable,
                     int64_t ahead, Floats (&sums)[2 * C][M]) {
  using R = Reader<T, W>;
  for_steps<R::STEP, R::COLUMNS>(rows, columns, readable, ahead, [&](int64_t k, const auto& weights) {
    for (int vector = 0; vector < R::VECTORS; ++vector) {
      Words weight[2 * C];
      for (int row = 0; row < 2 * C; ++row) weight[row] = R::words(weights(row), vector);
      for (int m = 0; m < M; ++m) {
        const Words input = R::load_input(inputs[m] + k / NUMBERS<T> + vector * LANES);
        for (int row = 0; row < 2 * C; ++row) sums[row][m] = multiply_add<T>(sums[row][m], input, weight[row]);
      }
    }
  });
}

// Gate and up of C channels for M tokens, each a sum over all columns. Token m's results are at gates[m * CHANNELS] and
// ups[m * CHANNELS]. A row has a scale for each of its groups; without scales `gate_scales` is null.
template <int M, int C, typename T, typename W>
inline void dot(const Word* const* x, const W* gate, const W* up, const Layout& layout, const float* gate_scales,
                const float* up_scales, float* gates, float* ups) {
  const W* rows[2 * C];
  for (int c = 0; c < C; ++c) rows[2 * c] = gate + c * layout.row_size, rows[2 * c + 1] = up + c * layout.row_size;
  const Word* inputs[M];
  std::copy_n(x, M, inputs);
  const int64_t step = std::max<int64_t>(C * layout.row_size, AHEAD / sizeof(W));
  const int64_t ahead = are_asked_for<W>(layout.row_size) ? step : 0;
  Floats sums[2 * C][M] = {};
  if constexpr (std::is_same_v<T, W>) {
    multiply<M, C, T>(inputs, rows, layout.columns, layout.columns, ahead, sums);
  } else {
    for (int64_t group = 0; group < layout.groups; ++group) {
      Floats unscaled[2 * C][M] = {};
      multiply<M, C, T>(inputs, rows, layout.columns, (layout.groups - group) * layout.columns, ahead, unscaled);
      for (int row = 0; row < 2 * C; ++row) {
        const float scale = (row % 2 ? up_scales : gate_scales)[row / 2 * layout.groups + group];
        for (int m = 0; m < M; ++m) sums[row][m] += scale * unscaled[row][m];
        rows[row] += layout.group_size;
      }
      for (auto& input : inputs) input += layout.group_words;
    }
  }
  for (int c = 0; c < C; ++c)
    for (int m = 0; m < M; ++m) {
      gates[m * CHANNELS + c] = sum(sums[2 * c][m]);
      ups[m * CHANNELS + c] = sum(sums[2 * c + 1][m]);
    }
}

// Writes a row of weights as words.
template <typename T, typename W>
inline void widen_row(const W* row, const Layout& layout, Word* to) {
  using R = Reader<T, W>;
  for (int64_t group = 0; group < layout.groups; ++group) {
    const W* rows[] = {row + group * layout.group_size};
    const int64_t readable = (layout.groups - group) * layout.columns;
    const auto widen = [&](int64_t k, const auto& weights) {
      for (int vector = 0; vector < R::VECTORS; ++vector)
        *reinterpret_cast<WordsAt*>(to + k / NUMBERS<T> + vector * LANES) = R::words(weights(0), vector);
    };
    for_steps<R::STEP, R::COLUMNS>(rows, layout.columns, readable, layout.row_size, widen);
    to += layout.group_words;
  }
}

// A step of down: one row, or two that share words, in P pairs of columns.
template <int P>
using Panel = Columns[P];

// Asks for rows of a matrix, a few lines at a time, in the order in which they lie in memory. Asked for column by
// column, a line of each row, they came at half the speed.
class Lines {
 public:
  // Rows are `bytes` long and begin `stride` bytes after each other.
  Lines(const void* first, int64_t bytes, int64_t stride)
      : next_(static_cast<const char*>(first)), end_(next_ + bytes), gap_(stride - bytes), stride_(stride) {}

  // The lines of the next `bytes` bytes, rounded up.
  void ask(int bytes) {
    for (; bytes > 0; bytes -= LINE) {
      __builtin_prefetch(next_);
      next_ += LINE;
      if (next_ >= end_) next_ += gap_, end_ += stride_;
    }
  }

 private:
  static constexpr int LINE = 64;
  const char *next_, *end_;
  const int64_t gap_, stride_;
};

// The first `count` of PAIR columns; the others are read as zeros.
template <typename T, typename W>
[[gnu::noinline]] Columns last_columns(const W* row, const W* next, int64_t count) {
  using R = Reader<T, W>;
  W ends[2][PAIR / R::COLUMNS] = {};
  std::memcpy(ends[0], row, count / R::COLUMNS * sizeof(W));
  if (next) std::memcpy(ends[1], next, count / R::COLUMNS * sizeof(W));
  return R::columns(ends[0], next ? ends[1] : nullptr);
}

// Fills a panel with `steps` steps. `down` points to the first of its rows, of which there are `rows`, and `count` is
// the number of columns from there to the last. With LOOKS_AHEAD the next columns of the rows are asked for.
template <int P, bool LOOKS_AHEAD, typename T, typename W>
[[gnu::always_inline]] inline void pack(const W* down, int64_t rows, int64_t row_size, int64_t count, int steps,
                                        Panel<P>* panel) {
  using R = Reader<T, W>;
  constexpr int64_t ahead = P * PAIR / R::COLUMNS;
  for (int step = 0; step < steps; ++step) {
    const W* row = down + step * NUMBERS<T> * row_size;
    const bool has_next = NUMBERS<T> == 2 && step * NUMBERS<T> + 1 < rows;
    for (int p = 0; p < P; ++p, row += PAIR / R::COLUMNS) {
      const W* next = has_next ? row + row_size : nullptr;
      if (LOOKS_AHEAD) __builtin_prefetch(row + ahead);
      if (LOOKS_AHEAD && next) __builtin_prefetch(next + ahead);
      panel[step][p] = count >= (p + 1) * PAIR ? R::columns(row, next) : last_columns<T>(row, next, count - p * PAIR);
    }
  }
}

// sums += hidden times the panel, for M tokens and P pairs of columns.
template <int P, typename T, size_t M>
inline void multiply_panel(const std::array<const Word*, M>& hidden, const Panel<P>* panel, int steps,
                           Pair (&sums)[M][P]) {
  for (int step = 0; step < steps; ++step)
    for (size_t m = 0; m < M; ++m) {
      const Words word = Words{} + hidden[m][step];
      for (int p = 0; p < P; ++p) {
        sums[m][p].first = multiply_add<T>(sums[m][p].first, word, panel[step][p].first);
        sums[m][p].second = multiply_add<T>(sums[m][p].second, word, panel[step][p].second);
      }
    }
}

// outputs[m] += hidden[m] times the panel, for M tokens and P pairs of columns from `column` on. Tokens are distinct.
template <int P, typename T, size_t M>
inline void add(const std::array<const Word*, M>& hidden, const Panel<P>* panel, int steps,
                const std::array<float*, M>& outputs, int64_t column) {
  Pair sums[M][P];
  for (size_t m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) sums[m][p] = load(outputs[m] + column + p * PAIR);
  multiply_panel<P, T>(hidden, panel, steps, sums);
  for (size_t m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) store(outputs[m] + column + p * PAIR, sums[m][p]);
}

inline void add_scaled(float* output, Pair scales, Pair values) {
  const Pair before = load(output);
  store(output, Pair{before.first + scales.first * values.first, before.second + scales.second * values.second});
}

// The same, where a column's products with these rows are to be scaled before they are added.
template <int P, typename T, size_t M>
inline void add_scaled(const std::array<const Word*, M>& hidden, const Panel<P>* panel, int steps,
                       const Pair (&scales)[P], const std::array<float*, M>& outputs, int64_t column) {
  Pair sums[M][P] = {};
  multiply_panel<P, T>(hidden, panel, steps, sums);
  for (size_t m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) add_scaled(outputs[m] + column + p * PAIR, scales[p], sums[m][p]);
}

// Scales of PAIR columns, ordered like them. Beyond `count` there are none.
template <typename T>
inline Pair load_scales(const float* scales, int64_t count) {
  if (count >= PAIR) return in_order_of<T>(load(scales));
  float ends[PAIR] = {};
  if (count > 0) std::memcpy(ends, scales, count * sizeof(float));
  return in_order_of<T>(load(ends));
}
