// Dots of integer rows over weights of four bits, whose layout `moejax.config.int4` describes.
//
// Four bits are an integer, less the zero point of its group if there are some, or a number of FP4 E2M1, of which twice
// as much is an integer too. The products of 32 columns (FP4: of 16) are summed as integers, which is exact, and the
// sums are multiplied by the scale of their group and added in float32, four after four: the order is that of the
// columns, whichever tile of rows computes it.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

constexpr int64_t GROUP = 32;             // numbers that are summed as integers
constexpr int64_t PAIR_WORDS = 16;        // of two groups
constexpr int64_t QUAD = 4 * GROUP;       // of four groups, whose sums lie side by side
constexpr int64_t QUAD_WORDS = 32;        // four numbers each

struct Nibbles {  // integers from -8 on
  uint16_t four;
};

struct Fp4 {
  uint16_t four;
};

// Sums of a group of 32 that have scales of their own.
template <typename W>
constexpr int SETS = 1;
template <>
constexpr int SETS<Fp4> = 2;

// Twice the numbers of FP4 E2M1 (OCP Microscaling 1.0, 5.3.3).
alignas(16) constexpr int8_t TWICE_FP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

enum class ScaleForm { HALF, BFLOAT16, EXPONENT, FLOAT8, FLOAT };

inline int64_t scale_bytes(ScaleForm form) {
  return form == ScaleForm::FLOAT ? 4 : form <= ScaleForm::BFLOAT16 ? 2 : 1;
}

// Scales of the groups of a matrix, `count` a row, as they are stored: `unit` times the form's number, times the row's
// factor. `group` is that of a scale, in columns. Zero points are those of integers from -8 on. Of eight bits, `rows`
// rows share their scales and zero points.
struct Groups {
  const void* scale;
  ScaleForm form;
  float unit;
  int64_t count, group;
  const float* factor;  // of each row, or none
  const int8_t* zeros;  // `count` a row, or none
  int64_t rows = 1;
};

typedef float NibbleSums __attribute__((vector_size(32)));  // partial sums of a number of a result

inline int64_t pairs(int64_t D) { return (D + 2 * GROUP - 1) / (2 * GROUP); }

inline int64_t quads(int64_t D) { return (pairs(D) + 1) / 2; }

// A number of 16 bits (IEEE 754) as float32.
inline float widened(uint16_t half) {
  uint32_t exponent = half >> 10 & 31, fraction = half & 1023, bits = uint32_t{half & 0x8000u} << 16;
  float value;
  if (exponent == 0) {
    value = fraction * (1.0f / (1 << 24));
    return bits ? -value : value;
  }
  bits |= (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The scales of a row of weights, four for each quad; a pair that is left over has each of its own twice.
inline void widen_scales(const uint16_t* halves, int64_t count, float* scales) {
  int64_t i = 0, whole = count / 2 * 4;
#ifdef __F16C__
  for (; i + 4 <= whole; i += 4)
    _mm_storeu_ps(scales + i, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(halves + i))));
#endif
  for (; i < whole; ++i) scales[i] = widened(halves[i]);
  if (count % 2)
    for (int n = 0; n < 4; ++n) scales[whole + n] = widened(halves[whole + n / 2]);
}

// The numbers of FP8 E4M3 by their bits (OCP 8-bit Floating Point 1.0, 3.1).
inline const std::array<float, 256>& float8_numbers() {
  static const std::array<float, 256> numbers = [] {
    std::array<float, 256> found;
    for (int bits = 0; bits < 256; ++bits) {
      int exponent = bits >> 3 & 15, mantissa = bits & 7;
      float size = exponent ? (8 + mantissa) / 1024.0f * (1 << exponent) : mantissa / 512.0f;
      if ((bits & 127) == 127) size = std::numeric_limits<float>::quiet_NaN();
      found[bits] = bits & 128 ? -size : size;
    }
    return found;
  }();
  return numbers;
}

// Two to the power of E8M0 (OCP Microscaling 1.0, 5.4.1).
inline float power(uint8_t exponent) {
  uint32_t bits = exponent == 255 ? 0x7fc00000u : exponent ? uint32_t{exponent} << 23 : 0x00400000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The scales of one row of weights in float32.
inline void plain_scales(const Groups& groups, int64_t row, float* scales) {
  int64_t count = groups.count;
  const uint8_t* bytes = static_cast<const uint8_t*>(groups.scale) + row * count;
  const uint16_t* words = static_cast<const uint16_t*>(groups.scale) + row * count;
  switch (groups.form) {
    case ScaleForm::HALF:
      for (int64_t i = 0; i < count; ++i) scales[i] = widened(words[i]);
      break;
    case ScaleForm::BFLOAT16:
      for (int64_t i = 0; i < count; ++i) {
        uint32_t bits = uint32_t{words[i]} << 16;
        std::memcpy(scales + i, &bits, sizeof bits);
      }
      break;
    case ScaleForm::EXPONENT:
      for (int64_t i = 0; i < count; ++i) scales[i] = power(bytes[i]);
      break;
    case ScaleForm::FLOAT8:
      for (int64_t i = 0; i < count; ++i) scales[i] = float8_numbers()[bytes[i]];
      break;
    case ScaleForm::FLOAT:
      std::memcpy(scales, static_cast<const float*>(groups.scale) + row * count, count * sizeof *scales);
  }
  if (groups.factor != nullptr)
    for (int64_t i = 0; i < count; ++i) scales[i] *= groups.factor[row];
}

// The scales of a row of weights as they meet the sums: of each quad, four for each set of sums. A pair that is left
// over has each of its own twice. Zero points lie likewise, each twice beside itself. `room` is for `2 * count` numbers
// and more.
template <typename W>
void spread_groups(const Groups& groups, int64_t row, int64_t D, std::vector<float>& room, float* scales,
                   int16_t* zeros) {
  if (SETS<W> == 1 && groups.form == ScaleForm::HALF && groups.group == GROUP && groups.count == 2 * pairs(D) &&
      groups.zeros == nullptr)
    return widen_scales(static_cast<const uint16_t*>(groups.scale) + row * groups.count, pairs(D), scales);
  constexpr int64_t unit = GROUP / SETS<W>;
  int64_t units = 2 * pairs(D) * SETS<W>, last = groups.count - 1;
  room.resize(groups.count + units);
  float *plain = room.data(), *by_unit = plain + groups.count;
  plain_scales(groups, row, plain);
  std::vector<int8_t> zero_of(zeros == nullptr ? 0 : units);
  for (int64_t i = 0, at = 0, left = groups.group; i < units; ++i) {
    by_unit[i] = plain[at];
    if (zeros != nullptr) zero_of[i] = groups.zeros[row * groups.count + at];
    if ((left -= unit) <= 0 && at < last) ++at, left = groups.group;
  }
  for (int64_t q = 0; q < quads(D); ++q) {
    bool half = 2 * q + 1 == pairs(D);
    for (int lane = 0; lane < 4; ++lane) {
      int64_t nth = 4 * q + (half ? lane / 2 : lane);
      for (int set = 0; set < SETS<W>; ++set) scales[(q * SETS<W> + set) * 4 + lane] = by_unit[nth * SETS<W> + set];
      if (zeros != nullptr) zeros[8 * q + 2 * lane] = zeros[8 * q + 2 * lane + 1] = zero_of[nth * SETS<W>];
    }
  }
}

// The integers of a row `[D]` as they meet the nibbles of each quad: [nibble][word].
inline void arrange(const int16_t* row, int64_t D, int16_t* arranged) {
  for (int64_t q = 0; q < quads(D); ++q) {
    int16_t padded[QUAD] = {};
    const int16_t* from = row + q * QUAD;
    if ((q + 1) * QUAD > D) {
      std::memcpy(padded, from, (D - q * QUAD) * sizeof *from);
      from = padded;
    }
    bool half = 2 * q + 1 == pairs(D);
    int16_t* to = arranged + q * QUAD;
    for (int nibble = 0; nibble < 4; ++nibble)
      for (int lane = 0; lane < 16; ++lane) {
        int group = half ? lane % 4 / 2 : lane % 4, nth = half ? lane / 4 * 2 + lane % 2 : lane / 4;
        const int16_t* two = half && lane >= 8 ? padded + QUAD - 2 : from + group * GROUP + nibble * 8 + nth * 2;
        std::memcpy(to + nibble * QUAD_WORDS + 2 * lane, two, 2 * sizeof *two);
      }
  }
}

#if defined(__AVX512BW__)

// The four numbers of each word, as words.
template <typename W>
inline void split(__m512i words, __m512i numbers[4]) {
  if constexpr (std::is_same_v<W, Fp4>) {
    __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(TWICE_FP4)));
    __m512i nibble = _mm512_set1_epi8(15);
    __m512i even = _mm512_shuffle_epi8(table, _mm512_and_si512(words, nibble));
    __m512i odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(words, 4), nibble));
    numbers[0] = _mm512_srai_epi16(_mm512_slli_epi16(even, 8), 8);
    numbers[1] = _mm512_srai_epi16(_mm512_slli_epi16(odd, 8), 8);
    numbers[2] = _mm512_srai_epi16(even, 8), numbers[3] = _mm512_srai_epi16(odd, 8);
  } else {
    numbers[0] = _mm512_srai_epi16(_mm512_slli_epi16(words, 12), 12);
    numbers[1] = _mm512_srai_epi16(_mm512_slli_epi16(words, 8), 12);
    numbers[2] = _mm512_srai_epi16(_mm512_slli_epi16(words, 4), 12), numbers[3] = _mm512_srai_epi16(words, 12);
  }
}

// sums[m][n] over all quads, 16 partial sums each, of which those beyond the first 8 are added to them.
template <typename W, int M, int N>
inline void nibble_sums(const int16_t* const* x, const W* const* w, const float* const* scale,
                        const int16_t* const* zeros, int64_t D, NibbleSums out[M][N]) {
  __m512 sums[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  auto add_products = [](__m512i sum, const int16_t* row, __m512i numbers) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, _mm512_loadu_si512(row), numbers);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_loadu_si512(row), numbers));
#endif
  };
  auto step = [&](int64_t q, int n, __m512i words) {
    __m512i numbers[4];
    split<W>(words, numbers);
    if (zeros[n] != nullptr) {
      __m512i zero = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros[n] + 8 * q)));
      for (int k = 0; k < 4; ++k) numbers[k] = _mm512_sub_epi16(numbers[k], zero);
    }
    __m512 by[SETS<W>];
    for (int set = 0; set < SETS<W>; ++set)
      by[set] = _mm512_broadcast_f32x4(_mm_loadu_ps(scale[n] + (q * SETS<W> + set) * 4));
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const int16_t* row = x[m] + q * QUAD;
      constexpr int each = 4 / SETS<W>;
#pragma GCC unroll 2
      for (int set = 0; set < SETS<W>; ++set) {
        __m512i sum = _mm512_madd_epi16(_mm512_loadu_si512(row + set * each * QUAD_WORDS), numbers[set * each]);
#pragma GCC unroll 3
        for (int k = set * each + 1; k < (set + 1) * each; ++k)
          sum = add_products(sum, row + k * QUAD_WORDS, numbers[k]);
        sums[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by[set], sums[m][n]);
      }
    }
  };
  int64_t whole = D / QUAD + (D % QUAD > 2 * GROUP);
  for (int64_t q = 0; q < whole; ++q)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) step(q, n, _mm512_loadu_si512(w[n] + q * QUAD_WORDS));
  if (whole < quads(D))
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      step(whole, n,
           _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w[n] + whole * QUAD_WORDS))));
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      out[m][n] = _mm256_add_ps(_mm512_castps512_ps256(sums[m][n]),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sums[m][n]), 1)));
}

#elif defined(__AVX2__)

// The four numbers of each word, as words.
template <typename W>
inline void split(__m256i words, __m256i numbers[4]) {
  if constexpr (std::is_same_v<W, Fp4>) {
    __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(TWICE_FP4)));
    __m256i nibble = _mm256_set1_epi8(15), even = _mm256_shuffle_epi8(table, _mm256_and_si256(words, nibble));
    __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(words, 4), nibble));
    numbers[0] = _mm256_srai_epi16(_mm256_slli_epi16(even, 8), 8);
    numbers[1] = _mm256_srai_epi16(_mm256_slli_epi16(odd, 8), 8);
    numbers[2] = _mm256_srai_epi16(even, 8), numbers[3] = _mm256_srai_epi16(odd, 8);
  } else {
    numbers[0] = _mm256_srai_epi16(_mm256_slli_epi16(words, 12), 12);
    numbers[1] = _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 12);
    numbers[2] = _mm256_srai_epi16(_mm256_slli_epi16(words, 4), 12), numbers[3] = _mm256_srai_epi16(words, 12);
  }
}

template <typename W, int M, int N>
inline void nibble_sums(const int16_t* const* x, const W* const* w, const float* const* scale,
                        const int16_t* const* zeros, int64_t D, NibbleSums out[M][N]) {
  auto load = [](const void* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); };
  auto add_products = [](__m256i sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
  };
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m][n] = NibbleSums{};
  for (int64_t q = 0; q < quads(D); ++q) {
    int halves = 2 * q + 1 == pairs(D) ? 1 : 2;
    for (int n = 0; n < N; ++n) {
      __m256i sums[M][SETS<W>];
      for (int m = 0; m < M; ++m)
        for (int set = 0; set < SETS<W>; ++set) sums[m][set] = _mm256_setzero_si256();
      for (int half = 0; half < halves; ++half) {
        __m256i numbers[4];
        split<W>(load(w[n] + q * QUAD_WORDS + half * PAIR_WORDS), numbers);
        if (zeros[n] != nullptr) {
          __m256i zero = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros[n] + 8 * q)));
          for (int k = 0; k < 4; ++k) numbers[k] = _mm256_sub_epi16(numbers[k], zero);
        }
        for (int m = 0; m < M; ++m)
          for (int k = 0; k < 4; ++k) {
            __m256i& sum = sums[m][k * SETS<W> / 4];
            sum = add_products(sum, load(x[m] + q * QUAD + k * QUAD_WORDS + half * PAIR_WORDS), numbers[k]);
          }
      }
      for (int set = 0; set < SETS<W>; ++set) {
        const float* four = scale[n] + (q * SETS<W> + set) * 4;
        __m256 by = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
        for (int m = 0; m < M; ++m)
#ifdef __FMA__
          out[m][n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m][set]), by, out[m][n]);
#else
          out[m][n] = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[m][set]), by), out[m][n]);
#endif
      }
    }
  }
}

#else

template <typename W>
inline int16_t number(W word, int k) {
  if constexpr (std::is_same_v<W, Fp4>) return TWICE_FP4[word.four >> 4 * k & 15];
  return static_cast<int16_t>(word.four << (12 - 4 * k)) >> 12;
}

template <typename W, int M, int N>
inline void nibble_sums(const int16_t* const* x, const W* const* w, const float* const* scale,
                        const int16_t* const* zeros, int64_t D, NibbleSums out[M][N]) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m][n] = NibbleSums{};
  for (int64_t q = 0; q < quads(D); ++q) {
    int words = 2 * q + 1 == pairs(D) ? PAIR_WORDS : QUAD_WORDS;
    for (int n = 0; n < N; ++n) {
      int16_t numbers[QUAD] = {};
      for (int k = 0; k < 4; ++k)
        for (int i = 0; i < words; ++i)
          numbers[k * QUAD_WORDS + i] =
              number<W>(w[n][q * QUAD_WORDS + i], k) - (zeros[n] == nullptr ? 0 : zeros[n][8 * q + i % 8]);
      for (int m = 0; m < M; ++m) {
        const int16_t* row = x[m] + q * QUAD;
        for (int set = 0; set < SETS<W>; ++set) {
          int32_t sums[8] = {};
          for (int i = set * QUAD / SETS<W>; i < (set + 1) * QUAD / SETS<W>; ++i)
            sums[i / 2 % 8] += int32_t{row[i]} * numbers[i];
          for (int i = 0; i < 8; ++i)
            out[m][n][i] += static_cast<float>(sums[i]) * scale[n][(q * SETS<W> + set) * 4 + i % 4];
        }
      }
    }
  }
}

#endif
