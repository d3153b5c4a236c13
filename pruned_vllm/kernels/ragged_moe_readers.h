// How stored weights become words to multiply; ragged_moe_products.h includes this.
//
// Reader<T, W> reads elements W for inputs of type T. Weights are like the inputs (W is T), or codes of 8 or 4 bits,
// which become numbers in registers. These numbers are exact in both word formats, so scales are left to sums.
//
//   COLUMNS             columns in an element
//   STEP                columns that are read at once where products are summed along a row
//   words(p, vector)    STEP columns as words: one of VECTORS vectors. Which column an element of the input must be to
//                       meet its weight there, says input_column(element)
//   columns(row, next)  PAIR columns, whose products are summed over rows, ordered like load(const T*); a word has one
//                       row, or two, of which `next` may be null

#pragma once

#include <array>

#include "ragged_moe_vectors.h"

// A column: an integer, or e4m3fn (a sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7f and 0xff are NaN).
struct Int8 {
  uint8_t code;
};
struct Float8 {
  uint8_t code;
};

// Two columns, each a number from -8 to 7 plus 8. The first is in the low half.
struct Int4 {
  uint8_t codes;
};

template <typename T, typename W, typename = void>
struct Reader;

template <typename T>
struct Reader<T, T> {
  static constexpr int COLUMNS = 1, STEP = PAIR, VECTORS = STEP / LANES / NUMBERS<T>;
  static Words words(const T* p, int vector) { return ::words(p, vector); }
  static Words load_input(const Word* p) { return load_words(p); }
  static Columns columns(const T* row, const T* next) { return ::columns(row, next); }
};

// Words that another reader has made.
template <typename T>
struct Reader<T, Word> {
  static constexpr int COLUMNS = NUMBERS<T>, STEP = PAIR, VECTORS = STEP / LANES / NUMBERS<T>;
  static Words words(const Word* p, int vector) { return load_words(p + vector * LANES); }
  static Words load_input(const Word* p) { return load_words(p); }
};

typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(float))));

// LANES bytes with their signs.
inline Integers load_codes(const void* p) {
#if defined(__AVX512F__)
  return Integers(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return Integers(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  const int8_t* bytes = static_cast<const int8_t*>(p);
  return Integers{bytes[0], bytes[1], bytes[2], bytes[3]};
#endif
}

inline Floats decode(const Int8* p) { return __builtin_convertvector(load_codes(p), Floats); }

// The exponent is rebased by a product, which also takes care of denormals.
inline Floats decode(const Float8* p) {
  const Words codes = Words(load_codes(p)), magnitude = codes << 20 & 0x07f00000;
  const Words nan = Words(magnitude == 0x07f00000) & 0x7fc00000;
  return Floats(Words(Floats(magnitude) * 0x1p120f) | nan | (codes & 0x80000000));
}

// Columns at even places and at odd ones.
inline Pair decode(const Int4* p) {
  const Integers codes = load_codes(p);
  return {__builtin_convertvector((codes & 15) - 8, Floats), __builtin_convertvector((codes >> 4 & 15) - 8, Floats)};
}

// Reading codes leaves no place for the instruction that joins the halves of `load_words`.
struct CodeReader {
  static Words load_input(const Word* p) { return *reinterpret_cast<const WordsAt*>(p); }
};

// Words of one float.
template <typename T, typename W>
struct Reader<T, W, std::enable_if_t<NUMBERS<T> == 1 && !std::is_same_v<T, W> && !std::is_same_v<W, Word>>>
    : CodeReader {
  static constexpr bool IS_INT4 = std::is_same_v<W, Int4>;
  static constexpr int COLUMNS = 1 + IS_INT4, STEP = 4 * LANES, VECTORS = 4;

  static Words words(const W* p, int vector) {
    if constexpr (IS_INT4) {
      const Pair pair = decode(p + vector / 2 * LANES);
      return Words(vector % 2 ? pair.second : pair.first);
    } else {
      return Words(decode(p + vector * LANES));
    }
  }

  static constexpr int input_column(int element) {
    // ::words takes inputs of 16 bits at even places for one vector and those at odd places for the next.
    const int within = element % PAIR, vector = sizeof(T) == 2 ? within % 2 : within / LANES;
    const int lane = sizeof(T) == 2 ? within / 2 : within % LANES, start = element / PAIR * PAIR;
    return start + (IS_INT4 ? 2 * lane + vector : vector * LANES + lane);
  }

  static Columns columns(const W* row, const W*) {
    Pair pair;
    if constexpr (IS_INT4) {
      pair = sizeof(T) == 2 ? decode(row) : interleave(decode(row), Lanes());
    } else {
      pair = in_order_of<T>({decode(row), decode(row + LANES)});
    }
    return {Words(pair.first), Words(pair.second)};
  }
};

#ifdef __AVX512BF16__

// The bytes of bfloat16 numbers, by the low 7 bits of a code; signs are set apart.
struct Table {
  alignas(64) uint8_t low[128], high[128];
};

// The bits of a bfloat16 number that is number * 2^exponent, where 0 < number < 128.
constexpr int bfloat16_bits(int number, int exponent) {
  int digits = 0;
  while (number >> (digits + 1)) ++digits;
  return (127 + digits + exponent) << 7 | (number << (7 - digits) & 0x7f);
}

template <typename W>
constexpr Table make_table() {
  Table table{};
  for (int code = 0; code < 128; ++code) {
    int bits = 0;
    if constexpr (std::is_same_v<W, Int8>) {
      bits = code ? bfloat16_bits(code, 0) : bfloat16_bits(1, 7);  // 128, as -128 has these bits; 0 is seen to apart
    } else if (code == 0x7f) {
      bits = 0x7fc0;  // NaN
    } else if (code) {
      bits = code < 8 ? bfloat16_bits(code, -9) : bfloat16_bits(8 + code % 8, code / 8 - 10);
    }
    table.low[code] = bits & 0xff, table.high[code] = bits >> 8;
  }
  return table;
}

template <typename W>
constexpr Table TABLE = make_table<W>();

inline __m512i load_zmm(const void* p) { return _mm512_loadu_si512(p); }

// Numbers of 64 codes: of each 16, those of the first 8, and those of the others.
template <typename W>
inline Columns to_bfloat16(__m512i codes) {
  const auto look_up = [&](const uint8_t* table, __m512i places) {
    return _mm512_permutex2var_epi8(load_zmm(table), places, load_zmm(table + 64));
  };
  __m512i low, high;
  if constexpr (std::is_same_v<W, Int8>) {
    const __m512i magnitudes = _mm512_abs_epi8(codes);
    low = look_up(TABLE<W>.low, magnitudes);
    high = _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(codes, codes), look_up(TABLE<W>.high, magnitudes));
  } else {
    low = look_up(TABLE<W>.low, codes), high = look_up(TABLE<W>.high, codes);
  }
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8);  // high | (codes & sign)
  return {Words(_mm512_unpacklo_epi8(low, high)), Words(_mm512_unpackhi_epi8(low, high))};
}

// Numbers by the low 4 bits of each 16. The table has them twice, as the instruction looks at 5 bits.
inline Words to_bfloat16(__m512i codes) {
  static constexpr std::array<uint16_t, 32> table = [] {
    std::array<uint16_t, 32> bits{};
    for (int i = 0; i < 32; ++i) {
      const int number = i % 16 - 8;
      bits[i] = number < 0 ? 0x8000 | bfloat16_bits(-number, 0) : number ? bfloat16_bits(number, 0) : 0;
    }
    return bits;
  }();
  return Words(_mm512_permutexvar_epi16(codes, load_zmm(table.data())));
}

// Words of two bfloat16 numbers.
template <typename W>
struct Reader<BFloat16, W, std::enable_if_t<std::is_same_v<W, Int8> || std::is_same_v<W, Float8>>> : CodeReader {
  static constexpr int COLUMNS = 1, STEP = 64, VECTORS = 2;

  static Words words(const W* p, int vector) {
    const Columns words = to_bfloat16<W>(load_zmm(p));
    return vector ? words.second : words.first;
  }

  static constexpr int input_column(int element) { return element % 32 / 8 * 16 + element / 32 * 8 + element % 8; }

  static Columns columns(const W* row, const W* next) {
    // Where bytes go so that words, whose order `to_bfloat16` changes, are first those of even columns.
    static constexpr std::array<uint8_t, 64> places = [] {
      std::array<uint8_t, 64> bytes{};
      for (int i = 0; i < 64; ++i) bytes[i] = i % 2 * 32 + 2 * (i / 16 * 4 + i % 8 / 2) + i % 16 / 8;
      return bytes;
    }();
    const __m256i other = next ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)) : __m256i{};
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), other, 1);
    return to_bfloat16<W>(_mm512_permutexvar_epi8(load_zmm(places.data()), both));
  }
};

template <>
struct Reader<BFloat16, Int4> : CodeReader {
  static constexpr int COLUMNS = 2, STEP = 64, VECTORS = 2;

  static Words words(const Int4* p, int vector) {
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return to_bfloat16(vector ? _mm512_srli_epi16(codes, 4) : codes);
  }

  static constexpr int input_column(int element) { return element % 32 * 2 + element / 32; }

  static Columns columns(const Int4* row, const Int4* next) {
    // Each byte twice: one of `row`, then the one of `next` below it.
    static constexpr std::array<uint8_t, 64> places = [] {
      std::array<uint8_t, 64> bytes{};
      for (int i = 0; i < 64; ++i) bytes[i] = i / 2 % 2 * 16 + i / 4;
      return bytes;
    }();
    const __m128i other = next ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(next)) : __m128i{};
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), other, 1);
    const __m512i codes = _mm512_permutexvar_epi8(load_zmm(places.data()), _mm512_castsi256_si512(both));
    return {to_bfloat16(codes), to_bfloat16(_mm512_srli_epi16(codes, 4))};
  }
};

#endif
