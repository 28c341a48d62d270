// Published weights of eight bits, as `moejax.config.eight_bit` holds them, widened to the float32 numbers that they
// stand for: (number - zero point) * scale, rounded once.

#pragma once

#include "int4.h"

// Numbers as they are published: FP8 E4M3, by their bits, and integers with scales of groups.
struct Float8 {
  uint8_t bits;
};

struct Grouped8 {
  int8_t number;
};

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

inline float widened_one(int8_t x) { return x; }

inline float widened_one(Grouped8 x) { return x.number; }

inline float widened_one(Float8 x) { return float8_numbers()[x.bits]; }

inline Eight widened(const int8_t* p) {
#ifdef __AVX2__
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Eight wide;
  for (int i = 0; i < 8; ++i) wide[i] = p[i];
  return wide;
#endif
}

inline Eight widened(const Grouped8* p) { return widened(&p->number); }

// As a number of 16 bits with the same exponent, which is 2^8 too small. Unlike those of 32 bits, its smallest numbers
// are not flushed to zero. What is no number has all bits set there.
inline Eight widened(const Float8* p) {
#if defined(__AVX2__) && defined(__F16C__)
  __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  __m128i sign = _mm_slli_epi16(_mm_and_si128(bytes, _mm_set1_epi16(0x80)), 8);
  __m128i size = _mm_slli_epi16(_mm_and_si128(bytes, _mm_set1_epi16(0x7f)), 7);
  __m128i none = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f << 7));
  return _mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(sign, size), none)) * 256.0f;
#else
  Eight wide;
  for (int i = 0; i < 8; ++i) wide[i] = widened_one(p[i]);
  return wide;
#endif
}

// One row of weights `[D]` in float32; `scales` has room for those of its groups.
template <typename W>
void widen_row(const W* row, const Groups& groups, int64_t nth, int64_t D, float* scales, float* to) {
  plain_scales(groups, nth / groups.rows, scales);
  const int8_t* zeros = groups.zeros == nullptr ? nullptr : groups.zeros + nth / groups.rows * groups.count;
  for (int64_t i = 0, d = 0; d < D; ++i) {
    float scale = scales[i], zero = zeros == nullptr ? 0.0f : zeros[i];
    int64_t end = std::min(d + groups.group, D);
    for (; d + 8 <= end; d += 8) *reinterpret_cast<Eight*>(to + d) = (widened(row + d) - zero) * scale;
    for (; d < end; ++d) to[d] = (widened_one(row[d]) - zero) * scale;
  }
}
