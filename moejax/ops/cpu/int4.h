// Dots of integer rows over weights of four bits, whose layout `moejax.config.int4` describes.
//
// The products of a group are summed as integers, which is exact, and the sums are multiplied by the group's scale and
// added in float32, four groups after four: the order is that of the columns, whichever tile of rows computes it.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif

constexpr int64_t GROUP = 32;             // numbers with one scale
constexpr int64_t PAIR_WORDS = 16;        // of two groups
constexpr int64_t QUAD = 4 * GROUP;       // of four groups, whose sums lie side by side
constexpr int64_t QUAD_WORDS = 32;        // four numbers each
constexpr float SCALE_UNIT = 1.0f / 256;  // what a stored scale is multiplied with

struct Nibbles {
  uint16_t four;
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

// sums[m][n] over all quads, 16 partial sums each, of which those beyond the first 8 are added to them.
template <int M, int N>
inline void nibble_sums(const int16_t* const* x, const Nibbles* const* w, const float* const* scale, int64_t D,
                        NibbleSums out[M][N]) {
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
    __m512i first = _mm512_srai_epi16(_mm512_slli_epi16(words, 12), 12);
    __m512i second = _mm512_srai_epi16(_mm512_slli_epi16(words, 8), 12);
    __m512i third = _mm512_srai_epi16(_mm512_slli_epi16(words, 4), 12), fourth = _mm512_srai_epi16(words, 12);
    __m512 by = _mm512_broadcast_f32x4(_mm_loadu_ps(scale[n] + 4 * q));
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const int16_t* row = x[m] + q * QUAD;
      __m512i sum = _mm512_madd_epi16(_mm512_loadu_si512(row), first);
      sum = add_products(sum, row + QUAD_WORDS, second);
      sum = add_products(sum, row + 2 * QUAD_WORDS, third);
      sum = add_products(sum, row + 3 * QUAD_WORDS, fourth);
      sums[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by, sums[m][n]);
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

template <int M, int N>
inline void nibble_sums(const int16_t* const* x, const Nibbles* const* w, const float* const* scale, int64_t D,
                        NibbleSums out[M][N]) {
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
      __m256i sums[M];
      for (int m = 0; m < M; ++m) sums[m] = _mm256_setzero_si256();
      for (int half = 0; half < halves; ++half) {
        __m256i words = load(w[n] + q * QUAD_WORDS + half * PAIR_WORDS), numbers[4] = {
            _mm256_srai_epi16(_mm256_slli_epi16(words, 12), 12), _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 12),
            _mm256_srai_epi16(_mm256_slli_epi16(words, 4), 12), _mm256_srai_epi16(words, 12)};
        for (int m = 0; m < M; ++m)
          for (int k = 0; k < 4; ++k)
            sums[m] = add_products(sums[m], load(x[m] + q * QUAD + k * QUAD_WORDS + half * PAIR_WORDS), numbers[k]);
      }
      __m256 by = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(scale[n] + 4 * q));
      for (int m = 0; m < M; ++m)
#ifdef __FMA__
        out[m][n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), by, out[m][n]);
#else
        out[m][n] = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[m]), by), out[m][n]);
#endif
    }
  }
}

#else

template <int M, int N>
inline void nibble_sums(const int16_t* const* x, const Nibbles* const* w, const float* const* scale, int64_t D,
                        NibbleSums out[M][N]) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m][n] = NibbleSums{};
  for (int64_t q = 0; q < quads(D); ++q) {
    int words = 2 * q + 1 == pairs(D) ? PAIR_WORDS : QUAD_WORDS;
    for (int n = 0; n < N; ++n) {
      int16_t numbers[QUAD] = {};
      for (int k = 0; k < 4; ++k)
        for (int i = 0; i < words; ++i)
          numbers[k * QUAD_WORDS + i] = static_cast<int16_t>(w[n][q * QUAD_WORDS + i].four << (12 - 4 * k)) >> 12;
      for (int m = 0; m < M; ++m) {
        const int16_t* row = x[m] + q * QUAD;
        int32_t sums[8] = {};
        for (int i = 0; i < QUAD; ++i) sums[i / 2 % 8] += int32_t{row[i]} * numbers[i];
        for (int i = 0; i < 8; ++i) out[m][n][i] += static_cast<float>(sums[i]) * scale[n][4 * q + i % 4];
      }
    }
  }
}

#endif
