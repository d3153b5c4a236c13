// The two products of ragged_moe_cpu.cpp: `dot` is for gate and up, `pack` and `add` are for down.

#pragma once

#include <array>

#include "ragged_moe_vectors.h"

constexpr int CHANNELS = 24;  // of gate and up, at most, are one task of a thread
constexpr int ROWS = 4;       // of down are added at once to few tokens
constexpr int STEPS = 64;     // of one or two rows of down are added at once to more tokens

// What shares a step. Its sums take up most of the 32 registers of AVX-512, and at least half of the 16 of other CPUs.
#ifdef __AVX512F__
constexpr int DOT_TOKENS = 4, DOT_CHANNELS = 3, ADD_TOKENS = 6, ADD_PAIRS = 2;
#else
constexpr int DOT_TOKENS = 4, DOT_CHANNELS = 1, ADD_TOKENS = 6, ADD_PAIRS = 1;
#endif

using Word = uint32_t;

// Gate and up of C channels for M tokens, each a sum over all columns. Token m's results are at gates[m * CHANNELS] and
// ups[m * CHANNELS].
template <int M, int C, typename T>
inline void dot(const Word* const* x, const T* gate, const T* up, int64_t columns, float* gates, float* ups) {
  Floats sums[2 * C][M] = {};
  const T* rows[2 * C];
  for (int c = 0; c < C; ++c) rows[2 * c] = gate + c * columns, rows[2 * c + 1] = up + c * columns;
  const Word* inputs[M];
  std::copy_n(x, M, inputs);
  const auto step = [&](int64_t k, const auto& weights) {
    for (int vector = 0; vector < VECTORS<T>; ++vector) {
      Words weight[2 * C];
      for (int row = 0; row < 2 * C; ++row) weight[row] = words(weights(row), vector);
      for (int m = 0; m < M; ++m) {
        const Words input = load_words(inputs[m] + k / NUMBERS<T> + vector * LANES);
        for (int row = 0; row < 2 * C; ++row) sums[row][m] = multiply_add<T>(sums[row][m], input, weight[row]);
      }
    }
  };
  int64_t k = 0;
  for (; k + PAIR <= columns; k += PAIR) {
    for (int row = 0; row < 2 * C; ++row) __builtin_prefetch(rows[row] + k + C * columns);
    step(k, [&](int row) { return rows[row] + k; });
  }
  if (k < columns) {
    T ends[2 * C][PAIR] = {};
    for (int row = 0; row < 2 * C; ++row) std::memcpy(ends[row], rows[row] + k, (columns - k) * sizeof(T));
    step(k, [&](int row) { return ends[row]; });
  }
  for (int c = 0; c < C; ++c)
    for (int m = 0; m < M; ++m) {
      gates[m * CHANNELS + c] = sum(sums[2 * c][m]);
      ups[m * CHANNELS + c] = sum(sums[2 * c + 1][m]);
    }
}

// A step of down: one row, or two that share words, in P pairs of columns.
template <int P>
using Panel = Columns[P];

// Fills a panel with `steps` steps. `down` points to the first of its rows, of which there are `rows`, and `count` is
// the number of columns from there to the last. What lies `ahead` elements further is asked for.
template <int P, typename T>
inline void pack(const T* down, int64_t rows, int64_t row_size, int64_t count, int64_t ahead, int steps,
                 Panel<P>* panel) {
  for (int step = 0; step < steps; ++step) {
    const T* row = down + step * NUMBERS<T> * row_size;
    const bool is_last = step * NUMBERS<T> + 1 >= rows;
    const T* next = is_last ? nullptr : row + row_size;
    for (int p = 0; p < P; ++p) {
      __builtin_prefetch(row + p * PAIR + ahead);
      if (NUMBERS<T> == 2 && next) __builtin_prefetch(next + p * PAIR + ahead);
      if (count >= (p + 1) * PAIR) {
        panel[step][p] = columns(row + p * PAIR, next ? next + p * PAIR : nullptr);
      } else {
        T ends[2][PAIR] = {};
        std::memcpy(ends[0], row + p * PAIR, (count - p * PAIR) * sizeof(T));
        if (next) std::memcpy(ends[1], next + p * PAIR, (count - p * PAIR) * sizeof(T));
        panel[step][p] = columns<T>(ends[0], next ? ends[1] : nullptr);
      }
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
  for (int step = 0; step < steps; ++step)
    for (size_t m = 0; m < M; ++m) {
      const Words word = Words{} + hidden[m][step];
      for (int p = 0; p < P; ++p) {
        sums[m][p].first = multiply_add<T>(sums[m][p].first, word, panel[step][p].first);
        sums[m][p].second = multiply_add<T>(sums[m][p].second, word, panel[step][p].second);
      }
    }
  for (size_t m = 0; m < M; ++m)
    for (int p = 0; p < P; ++p) store(outputs[m] + column + p * PAIR, sums[m][p]);
}
