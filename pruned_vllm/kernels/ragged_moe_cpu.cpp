// Routed experts of different FFN widths on a CPU; ragged_moe_cpu.py compiles this file and calls it.
//
//   out[t] = sum over the experts e that token t chose of  weight[t, e] * down_e(silu(gate_e(x[t])) * up_e(x[t]))
//
// Weights are read where they lie: gate_up [2, rows, hidden_size] and down [rows, hidden_size], row by row one channel,
// expert e from row offsets[e] to offsets[e + 1]. Nothing is padded, packed or copied.
//
// With few tokens the time is that of reading weights. So both products walk an expert's rows in the order of memory,
// and ask for every line one step ahead: what the hardware foresees by itself ends at each page, and a row is about
// one. With many tokens it is that of multiplying; then weights are passed over again for every TOKENS tokens, a block
// of columns at a time, which stays in a cache meanwhile.
//
// Sums are float32, in an order that does not depend on the number of threads.

#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PAIR = 2 * LANES;   // elements that are loaded at once
constexpr int TOKENS = 4;         // share a pass over weights
constexpr int ROWS = 4;           // of down are added at once
constexpr int CHANNELS = 32;      // of gate and up are one task of a thread
constexpr int64_t COLUMNS = 1024; // of a block that is passed over again
constexpr size_t CACHE_LINE = 64;

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(float))));
// The same anywhere in memory.
typedef float FloatsAt __attribute__((vector_size(LANES * sizeof(float)), aligned(2), may_alias));
typedef uint32_t WordsAt __attribute__((vector_size(LANES * sizeof(float)), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// PAIR elements. Those of 16 bits come as the ones at even places and the ones at odd places, which costs a shift and a
// mask; inputs and outputs stay in that order until they are written.
struct Pair {
  Floats first, second;
};

inline Pair load(const float* p) {
  return {*reinterpret_cast<const FloatsAt*>(p), *reinterpret_cast<const FloatsAt*>(p + LANES)};
}

// A vector of 16-bit elements, two to a word. Two loads of half a cache line each, and not one of the whole, made a
// layer about 20 % faster for 64 tokens on AMD's Zen 5, and no slower for fewer.
inline Words load_words(const void* p) {
#ifdef __AVX512F__
  const __m256i* halves = static_cast<const __m256i*>(p);
  const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(halves));
  return Words(_mm512_inserti64x4(first, _mm256_loadu_si256(halves + 1), 1));
#else
  return *static_cast<const WordsAt*>(p);
#endif
}

inline Pair load(const BFloat16* p) {
  const Words words = load_words(p);
  return {Floats(words << 16), Floats(words & 0xffff0000)};
}

// float16 in the low halves of words: the exponent is rebased by a product, which also takes care of denormals.
inline Floats widen(Words halves) {
  const Words magnitude = (halves & 0x7fff) << 13;
  const Words infinite = Words(magnitude >= 0x0f800000) & 0x7f800000;
  return Floats(Words(Floats(magnitude) * 0x1p112f) | infinite | (halves & 0x8000) << 16);
}

inline Pair load(const Float16* p) {
  const Words words = load_words(p);
  return {widen(words & 0xffff), widen(words >> 16)};
}

inline void store(float* p, Pair values) {
  *reinterpret_cast<FloatsAt*>(p) = values.first;
  *reinterpret_cast<FloatsAt*>(p + LANES) = values.second;
}

// To nearest, ties to even; the result is in the high halves.
inline Words to_bfloat16(Floats values) {
  const Words words = Words(values), nan = Words(values != values);
  return ((words + 0x7fff + (words >> 16 & 1)) & ~nan) | (nan & 0x7fc00000);
}

inline void store(BFloat16* p, Pair values) {
  *reinterpret_cast<WordsAt*>(p) = to_bfloat16(values.first) >> 16 | (to_bfloat16(values.second) & 0xffff0000);
}

// The same to float16; the result is in the low halves. Denormals are rounded by a sum whose last place is theirs.
inline Words to_float16(Floats values) {
  const Words words = Words(values), sign = words >> 16 & 0x8000, magnitude = words & 0x7fffffff;
  const Words nan = Words(values != values), small = Words(magnitude < 0x38800000);
  const Words denormal = Words(Floats(magnitude) + 0.5f) - 0x3f000000;
  const Words rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  const Words infinite = Words(rounded >= 0x47800000);
  const Words normal = ((rounded - 0x38000000) >> 13 & ~infinite) | (infinite & 0x7c00);
  return sign | (nan & 0x7e00) | (~nan & ((small & denormal) | (~small & normal)));
}

inline void store(Float16* p, Pair values) {
  *reinterpret_cast<WordsAt*>(p) = to_float16(values.first) | to_float16(values.second) << 16;
}

// The last elements of a row, fewer than PAIR, and zeros.
template <typename T>
inline Pair load_end(const T* p, int64_t count) {
  T elements[PAIR] = {};
  std::memcpy(elements, p, count * sizeof(T));
  return load(elements);
}

inline float sum(Floats v) {
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, and exp(r) by its Taylor polynomial, to 1e-7. Unlike std::exp, loops
// of it become vector instructions.
inline float exponential(float x) {
  x = std::min(std::max(-87.0f, x), 89.0f);  // exp(89) is inf; what is no number becomes one here
  const float n = std::nearbyint(x * 1.442695041f);
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: the first times n is exact
  float power = 1.0f / 5040;
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) power = power * r + factor;
  const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return power * scale;
}

struct GateUp {
  Floats gate, up;  // sums yet to be summed up
};

// sums[m] += one channel's gate and up times token m's input, columns from start to end, for M tokens
template <int M, typename T>
inline void dot(const float* const* x, const T* gate, const T* up, int64_t row_size, int64_t start, int64_t end,
                GateUp* sums) {
  const float* inputs[M];
  GateUp own[M];
  for (int m = 0; m < M; ++m) inputs[m] = x[m], own[m] = sums[m];
  const auto step = [&](int64_t k, Pair gate_weights, Pair up_weights) {
    for (int m = 0; m < M; ++m) {
      const Pair input = load(inputs[m] + k);
      own[m].gate += gate_weights.first * input.first;
      own[m].up += up_weights.first * input.first;
      own[m].gate += gate_weights.second * input.second;
      own[m].up += up_weights.second * input.second;
    }
  };
  int64_t k = start;
  for (; k + PAIR <= end; k += PAIR) {
    __builtin_prefetch(gate + k + row_size);
    __builtin_prefetch(up + k + row_size);
    step(k, load(gate + k), load(up + k));
  }
  if (k < end) step(k, load_end(gate + k, end - k), load_end(up + k, end - k));
  for (int m = 0; m < M; ++m) sums[m] = own[m];
}

// out[m] += hidden[m][0] * down[0] + ... + hidden[m][J - 1] * down[J - 1], columns from start to end, for M tokens
template <int M, int J, typename T>
inline void add(const float* const* hidden, const T* down, int64_t row_size, int64_t start, int64_t end,
                float* const* out) {
  const auto step = [&](int64_t i, const Pair* weights) {
    for (int m = 0; m < M; ++m) {
      Pair total = load(out[m] + i);
      for (int j = 0; j < J; ++j) {
        total.first += hidden[m][j] * weights[j].first;
        total.second += hidden[m][j] * weights[j].second;
      }
      store(out[m] + i, total);
    }
  };
  Pair weights[J];
  int64_t i = start;
  for (; i + PAIR <= end; i += PAIR) {
    for (int j = 0; j < J; ++j) {
      __builtin_prefetch(down + (j + J) * row_size + i);
      weights[j] = load(down + j * row_size + i);
    }
    step(i, weights);
  }
  if (i < end) {
    for (int j = 0; j < J; ++j) weights[j] = load_end(down + j * row_size + i, end - i);
    step(i, weights);
  }
}

// Calls `call` with the number of tokens, 1 to TOKENS, as a constant.
template <typename Call>
inline void with_constant(int64_t tokens, Call call) {
  switch (tokens) {
    case 1: return call(std::integral_constant<int, 1>());
    case 2: return call(std::integral_constant<int, 2>());
    case 3: return call(std::integral_constant<int, 3>());
    default: return call(std::integral_constant<int, TOKENS>());
  }
}

// Uninitialised memory whose vectors do not straddle cache lines, which nearly halves the speed of `dot`.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(int64_t floats) {
  const size_t bytes = (floats * sizeof(float) / CACHE_LINE + 1) * CACHE_LINE;
  Buffer buffer(static_cast<float*>(std::aligned_alloc(CACHE_LINE, bytes)));
  if (!buffer) throw std::bad_alloc();
  return buffer;
}

// One expert that a token was sent to.
struct Choice {
  int64_t token;
  float weight;
  float* hidden;  // [the expert's width]: weight * silu(gate) * up
};

template <typename T>
class Layer {
 public:
  Layer(const T* gate_up, const T* down, int64_t rows, const int32_t* offsets, int64_t hidden_size, int64_t num_experts)
      : gate_(gate_up), up_(gate_up + rows * hidden_size), down_(down), offsets_(offsets), hidden_size_(hidden_size),
        num_experts_(num_experts), row_size_((hidden_size + PAIR - 1) / PAIR * PAIR) {}

  void run(const T* x, const float* topk_weights, const int32_t* topk_ids, int64_t num_tokens, int64_t top_k, T* out) {
    sort(topk_weights, topk_ids, num_tokens * top_k, top_k);
    inputs_ = allocate(num_tokens * row_size_);
    outputs_ = allocate(num_tokens * row_size_);
#pragma omp parallel
    {
#pragma omp for
      for (int64_t t = 0; t < num_tokens; ++t) {
        widen_row(x + t * hidden_size_, inputs_.get() + t * row_size_);
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

  // Tokens of the expert that share a pass, from choice `first` on.
  int64_t tokens_from(int64_t first, int64_t e) const { return std::min<int64_t>(TOKENS, starts_[e + 1] - first); }

  // Columns of a pass: all, unless weights are passed over more than once.
  int64_t block(int64_t e) const { return starts_[e + 1] - starts_[e] > TOKENS ? COLUMNS : row_size_; }

  // Sorts choices by expert. An id that is no expert, such as -1, and an expert without channels add nothing.
  void sort(const float* topk_weights, const int32_t* topk_ids, int64_t count, int64_t top_k) {
    const auto exists = [&](int32_t id) { return id >= 0 && id < num_experts_ && width(id) > 0; };
    starts_.assign(num_experts_ + 1, 0);
    for (int64_t i = 0; i < count; ++i)
      if (exists(topk_ids[i])) ++starts_[topk_ids[i] + 1];
    int64_t hidden_size = 0;
    for (int64_t e = 0; e < num_experts_; ++e) {
      hidden_size += starts_[e + 1] * width(e);
      for (int64_t c = 0; starts_[e + 1] && c < width(e); c += CHANNELS)
        tasks_.push_back({e, c, std::min(c + CHANNELS, width(e))});
      starts_[e + 1] += starts_[e];
    }
    choices_.resize(starts_[num_experts_]);
    hidden_ = allocate(hidden_size);
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t i = 0; i < count; ++i)
      if (exists(topk_ids[i])) choices_[next[topk_ids[i]]++] = {i / top_k, topk_weights[i], nullptr};
    float* hidden = hidden_.get();
    for (int64_t e = 0; e < num_experts_; ++e)
      for (int64_t i = starts_[e]; i < starts_[e + 1]; ++i, hidden += width(e)) choices_[i].hidden = hidden;
  }

  void widen_row(const T* from, float* to) const {
    int64_t i = 0;
    for (; i + PAIR <= hidden_size_; i += PAIR) store(to + i, load(from + i));
    if (i < hidden_size_) store(to + i, load_end(from + i, hidden_size_ - i));
  }

  void narrow_row(const float* from, T* to) const {
    int64_t i = 0;
    for (; i + PAIR <= hidden_size_; i += PAIR) store(to + i, load(from + i));
    T end[PAIR];
    if (i < hidden_size_) store(end, load(from + i)), std::memcpy(to + i, end, (hidden_size_ - i) * sizeof(T));
  }

  void gate_and_up(const Task& task) {
    const T* gate = gate_ + (offsets_[task.expert] + task.start) * hidden_size_;
    const T* up = up_ + (offsets_[task.expert] + task.start) * hidden_size_;
    const int64_t channels = task.end - task.start;
    for (int64_t i = starts_[task.expert]; i < starts_[task.expert + 1]; i += TOKENS) {
      const int64_t tokens = tokens_from(i, task.expert), columns = block(task.expert);
      const float* inputs[TOKENS];
      for (int64_t m = 0; m < tokens; ++m) inputs[m] = inputs_.get() + choices_[i + m].token * row_size_;
      GateUp sums[CHANNELS][TOKENS] = {};
      with_constant(tokens, [&](auto M) {
        for (int64_t start = 0; start < hidden_size_; start += columns)
          for (int64_t c = 0; c < channels; ++c)
            dot<M.value>(inputs, gate + c * hidden_size_, up + c * hidden_size_, hidden_size_, start,
                         std::min(start + columns, hidden_size_), sums[c]);
      });
      for (int64_t m = 0; m < tokens; ++m) {
        float g[CHANNELS], h[CHANNELS];
        for (int c = 0; c < CHANNELS; ++c) g[c] = sum(sums[c][m].gate), h[c] = sum(sums[c][m].up);
        for (int c = 0; c < CHANNELS; ++c) h[c] *= choices_[i + m].weight * g[c] / (1.0f + exponential(-g[c]));
        std::copy_n(h, channels, choices_[i + m].hidden + task.start);
      }
    }
  }

  // Adds the expert's outputs in columns from `first` to `last`.
  void add_down(int64_t e, int64_t first, int64_t last) {
    const T* down = down_ + offsets_[e] * hidden_size_;
    for (int64_t start = first; start < last; start += block(e))
      for (int64_t i = starts_[e]; i < starts_[e + 1]; i += TOKENS) {
        const int64_t tokens = tokens_from(i, e), end = std::min(start + block(e), last);
        const float* hidden[TOKENS];
        float* outputs[TOKENS];
        for (int64_t m = 0; m < tokens; ++m) {
          hidden[m] = choices_[i + m].hidden;
          outputs[m] = outputs_.get() + choices_[i + m].token * row_size_;
        }
        with_constant(tokens, [&](auto M) {
          int64_t j = 0;
          const auto add_rows = [&](auto J) {
            add<M.value, J.value>(hidden, down + j * hidden_size_, hidden_size_, start, end, outputs);
            for (int m = 0; m < M.value; ++m) hidden[m] += J.value;
            j += J.value;
          };
          while (j + ROWS <= width(e)) add_rows(std::integral_constant<int, ROWS>());
          while (j < width(e)) add_rows(std::integral_constant<int, 1>());
        });
      }
  }

  const T *gate_, *up_, *down_;
  const int32_t* offsets_;
  int64_t hidden_size_, num_experts_, row_size_;
  std::vector<Task> tasks_;
  std::vector<int64_t> starts_;  // [experts + 1]: where an expert's choices begin
  std::vector<Choice> choices_;
  Buffer hidden_, inputs_, outputs_;
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
