// Vectors of numbers, and the three types that weights come in; ragged_moe_cpu.cpp includes this.
//
// Products are of words of 32 bits and have float32 sums. A word is one float, or, where the CPU has instructions for
// that (AVX-512 BF16, which __AVX512BF16__ stands for), two bfloat16 numbers, whose products are both added to the sum.

#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PAIR = 2 * LANES;   // elements that are loaded at once

using Word = uint32_t;
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

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// Elements in order, as those at even places and at odd ones.
template <int... I>
inline Pair deinterleave(Pair pair, std::integer_sequence<int, I...>) {
  return {SHUFFLE(pair.first, pair.second, (2 * I)...), SHUFFLE(pair.first, pair.second, (2 * I + 1)...)};
}

// The other way round.
template <int... I>
inline Pair interleave(Pair pair, std::integer_sequence<int, I...>) {
  return {SHUFFLE(pair.first, pair.second, (I % 2 * LANES + I / 2)...),
          SHUFFLE(pair.first, pair.second, (I % 2 * LANES + I / 2 + LANES / 2)...)};
}

using Lanes = std::make_integer_sequence<int, LANES>;

// Elements in order, as load(const T*) orders its own.
template <typename T>
inline Pair in_order_of(Pair pair) {
  return sizeof(T) == 2 ? deinterleave(pair, Lanes()) : pair;
}

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

template <typename T>
constexpr int NUMBERS = 1;  // of a word in a product
#ifdef __AVX512BF16__
template <>
constexpr int NUMBERS<BFloat16> = 2;
#endif

template <typename T>
constexpr int VECTORS = 2 / NUMBERS<T>;  // of words, which PAIR elements are

// Words of PAIR elements, which are summed over: one of VECTORS vectors.
template <typename T>
inline Words words(const T* p, int vector) {
  if constexpr (NUMBERS<T> == 2) {
    return load_words(p);
  } else {
    const Pair pair = load(p);
    return Words(vector ? pair.second : pair.first);
  }
}

// Words of PAIR columns; rows are summed over. A word has one row, or two; `next` may be null.
struct Columns {
  Words first, second;
};

template <typename T>
inline Columns columns(const T* row, const T* next) {
  if constexpr (NUMBERS<T> == 2) {
    const Words low = load_words(row), high = next ? load_words(next) : Words{};
    return {(low & 0xffff) | high << 16, low >> 16 | (high & 0xffff0000)};
  } else {
    const Pair pair = load(row);
    return {Words(pair.first), Words(pair.second)};
  }
}

// Writes numbers as words that rows, not elements of a row, will be multiplied by. A last one without another gets 0.
template <typename T>
inline void write_words(const float* numbers, int64_t count, uint32_t* to) {
  if constexpr (NUMBERS<T> == 1) {
    std::memcpy(to, numbers, count * sizeof(float));
  } else {
    for (int64_t i = 0; i < count; i += 2) {
      const Words words = to_bfloat16(Floats{numbers[i], i + 1 < count ? numbers[i + 1] : 0.0f});
      to[i / 2] = words[0] >> 16 | (words[1] & 0xffff0000);
    }
  }
}

template <typename T>
inline Floats multiply_add(Floats sum, Words a, Words b) {
#ifdef __AVX512BF16__
  if constexpr (NUMBERS<T> == 2) return _mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b));
#endif
  return sum + Floats(a) * Floats(b);
}

inline float sum(Floats vector) {
  typedef float Four __attribute__((vector_size(4 * sizeof(float))));
  Four quarters[LANES / 4];
  std::memcpy(quarters, &vector, sizeof vector);
  for (int half = LANES / 8; half; half /= 2)
    for (int i = 0; i < half; ++i) quarters[i] += quarters[i + half];
  return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
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
