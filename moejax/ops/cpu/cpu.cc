// Dots over weights, experts, paged attention and sampling on a CPU, as XLA custom calls.
//
// One rule throughout: every number of a result is summed in an order that depends on its own row alone, never on the
// number of rows or on the other rows (docs/decisions/0001). So each number has one accumulator of LANES partial sums,
// run over the contracted axis from the front and added up by `total`, whichever tile of rows computes it.
// Weights are read where they are stored, once per call, as float32, bfloat16, int8 with a scale for each output, four
// bits with a scale for each group (int4.h), or published eight bits (eight_bit.h), a tile of which is widened at a time.
//
// Rows that multiply int8 or int4 weights are rounded to integers of 16 bits with a scale for each row: the error is at
// most a 65,000th of the row's largest number, a 256th of the error of int8 weights. Processors multiply twice as many
// of them at a time, and sums of integers are the same in any order (docs/decisions/0012).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "eight_bit.h"
#include "int4.h"
#include "spread.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t LANES = 8;               // of float32
#ifdef __AVX512BW__
constexpr int64_t SUMS = 16;  // of integers side by side
constexpr bool MANY = true;   // registers: 32, else 16
#else
constexpr int64_t SUMS = 8;
constexpr bool MANY = false;
#endif
constexpr int64_t COLUMNS = 4;             // of a tile
template <typename X>                      // rows of a tile: its sums and what they are made of fill the registers
constexpr int64_t ROWS = MANY ? 6 : std::is_same_v<X, float> ? 3 : 2;
constexpr int64_t STRETCH = 512 * SUMS;    // products that SUMS sums of 32 bits can hold: 512 * 127 * 32767 < 2^31
constexpr int64_t AHEAD = 2 * COLUMNS;     // rows of weights between the one that is read and the one that is prefetched
constexpr int64_t LEAST_COLUMNS = 64;      // of an expert in a piece
constexpr int64_t KEYS = 16;               // of a block of attention
constexpr int64_t BESIDE = 8;              // vectors of values that are mixed side by side
constexpr int64_t X_BYTES = 256 << 10;     // of the rows that should stay in the second-level cache

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(4), may_alias));
typedef int32_t Sums __attribute__((vector_size(SUMS * sizeof(int32_t))));
typedef int16_t Shorts __attribute__((vector_size(2 * SUMS * sizeof(int16_t)), aligned(2), may_alias));
typedef int8_t Bytes __attribute__((vector_size(2 * SUMS * sizeof(int8_t)), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(2), may_alias));

struct bfloat16 {
  uint16_t bits;
};

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }

inline Vector load(const bfloat16* p) {
#ifdef __AVX2__
  __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#else
  auto wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Integers) << 16;
  return reinterpret_cast<Vector&>(wide);
#endif
}

inline Shorts load(const int16_t* p) { return *reinterpret_cast<const Shorts*>(p); }

inline Shorts load(const int8_t* p) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Shorts>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Shorts>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Shorts);
#endif
}

inline float single(const float* p) { return *p; }

inline float single(const bfloat16* p) {
  uint32_t wide = uint32_t{p->bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

inline Vector all(float x) { return Vector{} + x; }

// a * b + c, rounded once where the processor can, and the same way in every tile: the compiler may not choose.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vector fused(Vector a, Vector b, Vector c) {
#ifdef __FMA__
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int i = 0; i < LANES; ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
#endif
}

// Products of a and b, neighbours added up, and c.
inline Sums paired(Shorts a, Shorts b, Sums c) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Sums>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(c), reinterpret_cast<__m512i>(a),
                                                    reinterpret_cast<__m512i>(b)));
#elif defined(__AVX512BW__)
  return c + reinterpret_cast<Sums>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return c + reinterpret_cast<Sums>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  for (int i = 0; i < SUMS; ++i) c[i] += int32_t{a[2 * i]} * b[2 * i] + int32_t{a[2 * i + 1]} * b[2 * i + 1];
  return c;
#endif
}

// Sums as float32, those beyond the first LANES added to them.
inline Vector folded(Sums v) {
#ifdef __AVX512BW__
  __m512i all = reinterpret_cast<__m512i>(v);
  return _mm256_cvtepi32_ps(_mm512_castsi512_si256(all)) + _mm256_cvtepi32_ps(_mm512_extracti64x4_epi64(all, 1));
#else
  return __builtin_convertvector(v, Vector);
#endif
}

// The sum of the lanes, always as ((0+1)+(2+3)) + ((4+5)+(6+7)).
inline float total(Vector v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

template <int N>
inline void totals(const Vector* v, float* sums) {
#ifdef __AVX2__
  if constexpr (N == 4) {
    __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
    return;
  }
#endif
  for (int n = 0; n < N; ++n) sums[n] = total(v[n]);
}

// e^x within two units of the last place for x <= 88; 0 below -87.
inline Vector exponential(Vector x) {
  Vector low = all(-87.0f);
  auto small = x < low;
  x = small ? low : x;
  x = x > all(88.0f) ? all(88.0f) : x;
  Vector n = x * 1.44269504f;
  Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  n = (n + magic) - magic;
  Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = all(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + next;
  p = p * (r * r) + r + 1.0f;
  Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector e = p * reinterpret_cast<Vector&>(power);
  return small ? Vector{} : e;
}

// log(x) within two units of the last place for positive numbers that are not denormal (Cephes).
inline Vector logarithm(Vector x) {
  Integers bits = reinterpret_cast<Integers&>(x), exponent = (bits >> 23) - 126;
  bits = (bits & 0x007fffff) | 0x3f000000;
  Vector m = reinterpret_cast<Vector&>(bits);  // 0.5 <= m < 1
  auto low = m < all(0.707106781f);
  Vector e = __builtin_convertvector(exponent, Vector);
  e = low ? e - 1.0f : e;
  m = low ? m + m - 1.0f : m - 1.0f;
  Vector p = all(7.0376836292e-2f), z = m * m;
  for (float next : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                     2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f})
    p = fused(p, m, all(next));
  return fused(e, all(0.693359375f), fused(p, m * z, fused(z, all(-0.5f), e * -2.12194440e-4f)) + m);
}

// Random bits number `at` of a key, as jax.random.bits makes them (Threefry 2x32, Salmon et al., SC 2011).
inline Words random_bits(uint32_t first, uint32_t second, Words at) {
  const uint32_t keys[3] = {first, second, first ^ second ^ 0x1BD11BDA};
  constexpr int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  Words a = Words{} + first, b = at + second;
#pragma GCC unroll 5
  for (uint32_t i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      a += b;
      b = ((b << turns[i % 2][j]) | (b >> (32 - turns[i % 2][j]))) ^ a;
    }
    a += keys[(i + 1) % 3], b += keys[(i + 2) % 3] + i + 1;
  }
  return a ^ b;
}

// Numbers `at` of Gumbel's distribution, as jax.random.gumbel makes them of such bits.
inline Vector gumbel(uint32_t first, uint32_t second, Words at) {
  Words bits = (random_bits(first, second, at) >> 9) | 0x3f800000u;
  Vector tiny = all(std::numeric_limits<float>::min()), uniform = reinterpret_cast<Vector&>(bits) - 1.0f + tiny;
  return -logarithm(-logarithm(uniform));
}

// y[m][n] = x[m] . w[n] for M rows and N weights of D numbers.
template <int M, int N, typename W>
inline void tile(const float* const* x, const W* const* w, int64_t D, float y[M][N]) {
  Vector sums[M][N] = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) {
    Vector weights[N];
    for (int n = 0; n < N; ++n) weights[n] = load(w[n] + d);
    for (int m = 0; m < M; ++m) {
      Vector row = load(x[m] + d);
      for (int n = 0; n < N; ++n) sums[m][n] = fused(row, weights[n], sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    Vector each[N];
    for (int n = 0; n < N; ++n) each[n] = sums[m][n];
    totals<N>(each, y[m]);
  }
  for (; d < D; ++d)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) y[m][n] = fused(x[m][d], single(w[n] + d), y[m][n]);
}

template <int M, int N>
inline void tile(const int16_t* const* x, const int8_t* const* w, int64_t D, float y[M][N]) {
  int64_t whole = D / (2 * SUMS) * (2 * SUMS), d = 0;
  for (int m = 0; m < M; ++m) std::fill(y[m], y[m] + N, 0.0f);
  while (d < whole) {
    Sums sums[M][N] = {};
    for (int64_t end = std::min(d + STRETCH, whole); d < end; d += 2 * SUMS) {
      Shorts row[M];
      for (int m = 0; m < M; ++m) row[m] = load(x[m] + d);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        Shorts weights = load(w[n] + d);
        for (int m = 0; m < M; ++m) sums[m][n] = paired(row[m], weights, sums[m][n]);
      }
    }
    for (int m = 0; m < M; ++m) {
      Vector each[N];
      float stretch[N];
      for (int n = 0; n < N; ++n) each[n] = folded(sums[m][n]);
      totals<N>(each, stretch);
      for (int n = 0; n < N; ++n) y[m][n] += stretch[n];
    }
  }
  for (; d < D; ++d)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) y[m][n] += int32_t{x[m][d]} * w[n][d];
}

template <int M, int N, typename X, typename W>
inline void tile_into(const X* const* x, const W* const* w, int64_t D, float* const* y, int64_t column) {
  float out[M][N];
  if constexpr (std::is_same_v<X, float>)
    tile<M, N, W>(x, w, D, out);
  else
    tile<M, N>(x, w, D, out);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) y[m][column + n] = out[m][n];
}

// One tile of `rows` rows, at most M.
template <int M, int N, typename X, typename W>
inline void tile_of(int64_t rows, const X* const* x, const W* const* w, int64_t D, float* const* y, int64_t column) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<M - 1, N>(rows, x, w, D, y, column);
  tile_into<M, N>(x, w, D, y, column);
}

// In as few tiles as can be, of nearly the same size.
template <int N, typename X, typename W>
void tile_rows(const X* const* x, const W* const* w, int64_t rows, int64_t D, float* const* y, int64_t column) {
  for (int64_t m = 0, tiles = (rows + ROWS<X> - 1) / ROWS<X>; tiles > 0; --tiles) {
    int64_t some = (rows - m + tiles - 1) / tiles;
    tile_of<ROWS<X>, N>(some, x + m, w, D, y + m, column);
    m += some;
  }
}

template <int N, typename X, typename W>
void block(const X* const* x, const W* const* w, int64_t rows, int64_t D, float* const* y, int64_t column,
           std::vector<float>&) {
  tile_rows<N>(x, w, rows, D, y, column);
}

// Where registers are few, weights that several tiles use are widened once; what is multiplied is the same.
template <int N>
void block(const float* const* x, const bfloat16* const* w, int64_t rows, int64_t D, float* const* y, int64_t column,
           std::vector<float>& room) {
  if (MANY || rows <= ROWS<float>) return tile_rows<N>(x, w, rows, D, y, column);
  room.resize(N * D);
  const float* wide[N];
  for (int n = 0; n < N; ++n) {
    float* to = room.data() + n * D;
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) store(to + d, load(w[n] + d));
    for (; d < D; ++d) to[d] = single(w[n] + d);
    wide[n] = to;
  }
  tile_rows<N>(x, wide, rows, D, y, column);
}

// Prefetches what is read next: rows of weights are too short for the processor's own prefetcher.
template <typename W>
inline void ahead(const W* first, const W* last) {
  for (const char* line = reinterpret_cast<const char*>(first); line < reinterpret_cast<const char*>(last); line += 64)
    __builtin_prefetch(line, 0, 2);
}

template <typename W>
constexpr bool NIBBLES = std::is_same_v<W, Nibbles> || std::is_same_v<W, Fp4>;

template <typename W>
constexpr bool WIDENED = std::is_same_v<W, Float8> || std::is_same_v<W, Grouped8>;

// A matrix [F, D], row after row, each multiplied by its `scale` if there is one, or by those of groups.
template <typename W>
struct Matrix {
  using Scale = std::conditional_t<NIBBLES<W> || WIDENED<W>, Groups, const float*>;
  const W* numbers;
  Scale scale;
};

// A weight as a call has it: numbers, scales, and factors of rows or zero points, each empty unless there are some.
struct Weight {
  ffi::AnyBuffer numbers, scale, more;
  int64_t group, rows;
};

// True for weights that multiply rows of integers.
template <typename W>
constexpr bool OF_INTEGERS = std::is_same_v<W, int8_t> || NIBBLES<W>;

// The type of a row that multiplies weights of type W.
template <typename W>
using Number = std::conditional_t<OF_INTEGERS<W>, int16_t, float>;

template <typename W>
struct Row {
  const Number<W>* x;
  float scale;  // the factor of each number
};

// Integers of at most 15 bits and a sign for D numbers, and their scale, which is NaN if one of them was.
float to_integers(const float* row, int64_t D, int16_t* integers) {
  int32_t most = 0;
  for (int64_t d = 0; d < D; ++d) {
    int32_t bits;
    std::memcpy(&bits, row + d, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  bool usable = std::isfinite(largest) && largest > 1e-30f;
  float inverse = usable ? 32767 / largest : 0.0f, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t d = 0; d < D; ++d)
    integers[d] = static_cast<int32_t>((usable ? row[d] : 0.0f) * inverse + magic - magic);
  return usable ? largest / 32767 : std::isfinite(largest) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
}

// Rows that are multiplied in one go: as many as stay in the second-level cache.
template <typename X>
int64_t rows_at_once(int64_t D) {
  int64_t fit = X_BYTES / (D * sizeof(X));
  return std::max<int64_t>(ROWS<X>, fit / ROWS<X> * ROWS<X>);
}

// y[m][column..column + N) for one tile of `rows` rows, at most M.
template <typename W, int M, int N>
inline void nibble_tile(int64_t rows, const Row<W>* x, const W* const* w, const float* const* scale,
                        const int16_t* const* zeros, float unit, int64_t D, float* const* y, int64_t column) {
  if constexpr (M > 1)
    if (rows < M) return nibble_tile<W, M - 1, N>(rows, x, w, scale, zeros, unit, D, y, column);
  const int16_t* integers[M];
  for (int m = 0; m < M; ++m) integers[m] = x[m].x;
  NibbleSums sums[M][N];
  nibble_sums<W, M, N>(integers, w, scale, zeros, D, sums);
  for (int m = 0; m < M; ++m) {
    Vector each[N];
    float out[N];
    for (int n = 0; n < N; ++n) std::memcpy(&each[n], &sums[m][n], sizeof each[n]);
    totals<N>(each, out);
    for (int n = 0; n < N; ++n) y[m][column + n] = out[n] * (x[m].scale * unit);
  }
}

// Scales and zero points of COLUMNS columns as the sums meet them, and what they are made with.
struct GroupRoom {
  std::vector<float> scales, between;
  std::vector<int16_t> zeros;
};

// As `dots`, for N columns from `column` on.
template <int N, typename W>
void nibble_columns(const Row<W>* x, int64_t rows, const Matrix<W>& matrix, int64_t D, int64_t column, float* const* y,
                    GroupRoom& room) {
  const W* w[N];
  const float* scale[N];
  const int16_t* zeros[N];
  for (int n = 0; n < N; ++n) {
    w[n] = matrix.numbers + (column + n) * pairs(D) * PAIR_WORDS;
    float* scales = room.scales.data() + n * 4 * SETS<W> * quads(D);
    int16_t* points = matrix.scale.zeros == nullptr ? nullptr : room.zeros.data() + n * 8 * quads(D);
    spread_groups<W>(matrix.scale, column + n, D, room.between, scales, points);
    scale[n] = scales;
    zeros[n] = points;
  }
  for (int64_t m = 0, tiles = (rows + ROWS<int16_t> - 1) / ROWS<int16_t>; tiles > 0; --tiles) {
    int64_t some = (rows - m + tiles - 1) / tiles;
    nibble_tile<W, ROWS<int16_t>, N>(some, x + m, w, scale, zeros, matrix.scale.unit, D, y + m, column);
    m += some;
  }
}

template <typename W>
void nibble_dots(const std::vector<Row<W>>& rows, const Matrix<W>& matrix, int64_t D, int64_t first, int64_t last,
                 float* const* y) {
  int64_t size = rows.size(), width = pairs(D) * PAIR_WORDS, most = rows_at_once<int16_t>(quads(D) * QUAD);
  int64_t bytes = matrix.scale.count * scale_bytes(matrix.scale.form);
  auto scales = static_cast<const uint8_t*>(matrix.scale.scale);
  GroupRoom room;
  room.scales.resize(COLUMNS * 4 * SETS<W> * quads(D));
  room.zeros.resize(matrix.scale.zeros == nullptr ? 0 : COLUMNS * 8 * quads(D));
  for (int64_t t = 0; t < size; t += most) {
    int64_t some = std::min(most, size - t), f = first;
    for (; f + COLUMNS <= last; f += COLUMNS) {
      int64_t next = f + AHEAD, end = std::min(next + COLUMNS, last);
      ahead(matrix.numbers + next * width, matrix.numbers + end * width);
      ahead(scales + next * bytes, scales + end * bytes);
      nibble_columns<COLUMNS, W>(rows.data() + t, some, matrix, D, f, y + t, room);
    }
    for (; f < last; ++f) nibble_columns<1, W>(rows.data() + t, some, matrix, D, f, y + t, room);
  }
}

// Weights of a tile are widened first: the products and sums are those of float32.
template <typename W>
void widened_dots(const std::vector<Row<W>>& rows, const Matrix<W>& matrix, int64_t D, int64_t first, int64_t last,
                  float* const* y) {
  const W* w = matrix.numbers;
  std::vector<float> wide(COLUMNS * D), scales(matrix.scale.count);
  std::vector<const float*> x;
  for (const Row<W>& row : rows) x.push_back(row.x);
  const float* four[COLUMNS];
  for (int64_t n = 0; n < COLUMNS; ++n) four[n] = wide.data() + n * D;
  int64_t size = rows.size(), most = rows_at_once<float>(D);
  for (int64_t t = 0; t < size; t += most) {
    int64_t some = std::min(most, size - t);
    for (int64_t f = first; f < last; f += COLUMNS) {
      int64_t columns = std::min(COLUMNS, last - f);
      ahead(w + (f + AHEAD) * D, w + std::min(f + AHEAD + COLUMNS, last) * D);
      for (int64_t n = 0; n < columns; ++n)
        widen_row(w + (f + n) * D, matrix.scale, f + n, D, scales.data(), wide.data() + n * D);
      if (columns == COLUMNS) {
        tile_rows<COLUMNS>(x.data() + t, four, some, D, y + t, f);
      } else {
        for (int64_t n = 0; n < columns; ++n) tile_rows<1>(x.data() + t, four + n, some, D, y + t, f + n);
      }
    }
  }
}

template <typename W>
void plain_dots(const std::vector<Row<W>>& rows, Matrix<W> matrix, int64_t D, int64_t first, int64_t last,
                float* const* y) {
  const W* w = matrix.numbers;
  std::vector<float> room;
  std::vector<const Number<W>*> x;
  for (const Row<W>& row : rows) x.push_back(row.x);
  int64_t size = rows.size(), most = rows_at_once<Number<W>>(D);
  for (int64_t t = 0; t < size; t += most) {
    int64_t some = std::min(most, size - t), f = first;
    for (; f + COLUMNS <= last; f += COLUMNS) {
      ahead(w + (f + AHEAD) * D, w + std::min(f + AHEAD + COLUMNS, last) * D);
      const W* four[COLUMNS] = {w + f * D, w + (f + 1) * D, w + (f + 2) * D, w + (f + 3) * D};
      block<COLUMNS>(x.data() + t, four, some, D, y + t, f, room);
    }
    for (; f < last; ++f) {
      const W* one[1] = {w + f * D};
      block<1>(x.data() + t, one, some, D, y + t, f, room);
    }
  }
  if constexpr (std::is_same_v<W, int8_t>)
    for (int64_t t = 0; t < size; ++t)
      for (int64_t f = first; f < last; ++f) y[t][f] *= rows[t].scale * matrix.scale[f];
}

// y[t][first..last) = x[t] . w[f] for `rows` rows.
template <typename W>
void dots(const std::vector<Row<W>>& rows, Matrix<W> matrix, int64_t D, int64_t first, int64_t last, float* const* y) {
  if constexpr (NIBBLES<W>)
    nibble_dots<W>(rows, matrix, D, first, last, y);
  else if constexpr (WIDENED<W>)
    widened_dots<W>(rows, matrix, D, first, last, y);
  else
    plain_dots<W>(rows, matrix, D, first, last, y);
}

// Where in a stack the matrix of these indices starts, in matrices; -1 when an index is outside.
int64_t place(ffi::AnyBuffer::Dimensions stack, ffi::Span<const int32_t> index) {
  int64_t at = 0;
  for (size_t i = 0; i < index.size(); ++i) {
    if (index[i] < 0 || index[i] >= stack[i]) return -1;
    at = at * stack[i] + index[i];
  }
  return at;
}

std::vector<float*> row_pointers(float* x, int64_t rows, int64_t stride) {
  std::vector<float*> p(rows);
  for (int64_t i = 0; i < rows; ++i) p[i] = x + i * stride;
  return p;
}

// Rows of the type that multiplies weights of type W. Integers are stored in `room`.
template <typename W>
std::vector<Row<W>> meeting(ffi::ThreadPool& pool, const std::vector<const float*>& rows, int64_t D,
                            std::vector<int16_t>& room) {
  std::vector<Row<W>> met(rows.size());
  if constexpr (OF_INTEGERS<W>) {
    int64_t width = NIBBLES<W> ? quads(D) * QUAD : D;
    room.resize(rows.size() * width);
    spread(pool, rows.size(), 1, (1 << 16) / D, [&](int64_t first, int64_t last) {
      std::vector<int16_t> natural(NIBBLES<W> ? D : 0);
      for (int64_t i = first; i < last; ++i) {
        int16_t* integers = room.data() + i * width;
        met[i] = {integers, to_integers(rows[i], D, NIBBLES<W> ? natural.data() : integers)};
        if constexpr (NIBBLES<W>) arrange(natural.data(), D, integers);
      }
    });
  } else {
    for (size_t i = 0; i < rows.size(); ++i) met[i] = {rows[i], 1.0f};
  }
  return met;
}

// Rows of zeros, as padding is, give zeros whatever the weights are, and are not multiplied.
template <typename W>
void row_dot(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32>& x, Matrix<W> w, int64_t F, float* y) {
  int64_t D = x.dimensions().back(), T = x.element_count() / D;
  std::vector<const float*> rows;
  std::vector<float*> out;
  for (int64_t t = 0; t < T; ++t) {
    const float* row = x.typed_data() + t * D;
    if (std::any_of(row, row + D, [](float value) { return value != 0.0f; })) {
      rows.push_back(row);
      out.push_back(y + t * F);
    } else {
      std::fill(y + t * F, y + (t + 1) * F, 0.0f);
    }
  }
  std::vector<int16_t> room;
  std::vector<Row<W>> met = meeting<W>(pool, rows, D, room);
  spread(pool, F, COLUMNS, (1 << 16) / D,
         [&](int64_t first, int64_t last) { dots(met, w, D, first, last, out.data()); });
}

// The form of scales of groups, and what its numbers are multiplied with: those of float16 are stored 256-fold, but for
// published ones, whose bits are integers here, and numbers of FP4 are taken twice.
inline std::pair<ScaleForm, float> scale_form(ffi::DataType type) {
  switch (type) {
    case ffi::U8:
      return {ScaleForm::EXPONENT, 0.5f};
    case ffi::F8E4M3FN:
      return {ScaleForm::FLOAT8, 0.5f};
    case ffi::BF16:
      return {ScaleForm::BFLOAT16, 1.0f};
    case ffi::U16:
      return {ScaleForm::HALF, 1.0f};
    default:
      return {ScaleForm::HALF, 1.0f / 256};
  }
}

// The form of scales of eight bits.
inline ScaleForm wide_scale_form(ffi::DataType type) {
  switch (type) {
    case ffi::U8:
      return ScaleForm::EXPONENT;
    case ffi::BF16:
      return ScaleForm::BFLOAT16;
    case ffi::F16:
      return ScaleForm::HALF;
    default:
      return ScaleForm::FLOAT;
  }
}

// The matrix number `at` of a stack of F x D numbers each, with its scales if there are some.
template <typename W>
Matrix<W> matrix(const Weight& weight, int64_t at, int64_t F, int64_t D) {
  auto numbers = static_cast<const W*>(weight.numbers.untyped_data());
  if constexpr (NIBBLES<W>) {
    auto [form, unit] = scale_form(weight.scale.element_type());
    int64_t count = weight.scale.dimensions().back(), bytes = scale_bytes(form);
    auto first = static_cast<const uint8_t*>(weight.scale.untyped_data()) + at * F * count * bytes;
    bool more = weight.more.element_count() > 0, zeros = more && weight.more.element_type() == ffi::S8;
    auto factors = static_cast<const float*>(weight.more.untyped_data()) + at * F;
    auto points = static_cast<const int8_t*>(weight.more.untyped_data()) + at * F * count;
    Groups groups = {first, form, unit, count, weight.group, more && !zeros ? factors : nullptr,
                     zeros ? points : nullptr};
    return {numbers + at * F * pairs(D) * PAIR_WORDS, groups};
  } else if constexpr (WIDENED<W>) {
    ScaleForm form = wide_scale_form(weight.scale.element_type());
    int64_t count = weight.scale.dimensions().back(), first = at * ((F + weight.rows - 1) / weight.rows) * count;
    bool zeros = weight.more.element_count() > 0;
    auto points = static_cast<const int8_t*>(weight.more.untyped_data()) + first;
    Groups groups = {static_cast<const uint8_t*>(weight.scale.untyped_data()) + first * scale_bytes(form),
                     form, 1.0f, count, weight.group, nullptr, zeros ? points : nullptr, weight.rows};
    return {numbers + at * F * D, groups};
  } else {
    auto scale = reinterpret_cast<const float*>(weight.scale.untyped_data());
    return {numbers + at * F * D, weight.scale.element_count() > 0 ? scale + at * F : nullptr};
  }
}

// Calls `in_form` with a number of the type of the weights.
template <typename Form>
void with_form(const Weight& weight, Form in_form) {
  switch (weight.numbers.element_type()) {
    case ffi::BF16:
      return in_form(bfloat16{});
    case ffi::S8:
      if (weight.scale.dimensions().size() == weight.numbers.dimensions().size()) return in_form(Grouped8{});
      return in_form(int8_t{});
    case ffi::U8:
      return in_form(Float8{});
    case ffi::U16:
      if (scale_form(weight.scale.element_type()).first >= ScaleForm::EXPONENT) return in_form(Fp4{});
      return in_form(Nibbles{});
    default:
      return in_form(float{});
  }
}

ffi::Error RowDot(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer numbers, ffi::AnyBuffer scale,
                  ffi::AnyBuffer more, ffi::Buffer<ffi::S32> index, ffi::ResultBuffer<ffi::F32> y, int64_t group,
                  int64_t rows) {
  Weight weight = {numbers, scale, more, group, rows};
  auto stack = numbers.dimensions();
  int64_t D = x.dimensions().back(), F = stack[stack.size() - 2];
  int64_t at = place(stack, ffi::Span<const int32_t>(index.typed_data(), index.element_count()));
  if (at < 0) return ffi::Error::InvalidArgument("row_dot: index outside of the stack");
  with_form(weight, [&](auto number) {
    using W = decltype(number);
    row_dot(pool, x, matrix<W>(weight, at, F, D), F, y->typed_data());
  });
  return ffi::Error::Success();
}

// What is between the two matrices of an expert, numbered as ACTIVATIONS in __init__.py are.
enum class Activation : int64_t { SQUARE_OF_RELU, SWIGLU, GEGLU };

// SiLU of the gate times `up`; with `gelu` GELU, as x * sigmoid(2u) = x * (1 + tanh(u)) / 2.
template <bool gelu>
void gate_times(float* gate, const float* up, int64_t size) {
  constexpr float ROOT = 0.7978845608028654f, CUBE = 0.044715f;  // sqrt(2 / pi)
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    Vector g = load(gate + i), slope = g;
    if (gelu) slope = (g + g * g * g * CUBE) * (2.0f * ROOT);
    store(gate + i, g / (exponential(-slope) + 1.0f) * load(up + i));
  }
  if (i < size) {
    float g[LANES] = {}, u[LANES] = {};
    std::copy(gate + i, gate + size, g);
    std::copy(up + i, up + size, u);
    gate_times<gelu>(g, u, LANES);
    std::copy(g, g + (size - i), gate + i);
  }
}

void square_of_relu(float* x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    float positive = std::max(x[i], 0.0f);
    x[i] = positive * positive;
  }
}

// One slot with rows: the rows, the values between its two matrices, and its outputs.
template <typename W>
struct Expert {
  int64_t slot;
  std::vector<Row<W>> x, gated;
  std::vector<float*> hidden, y;
  std::vector<float> room;
  std::vector<int16_t> gated_room;

  void begin(int64_t above) {
    room.resize(x.size() * above);
    hidden = row_pointers(room.data(), x.size(), above);
  }
};

// Outputs of the experts, in two rounds of (expert, part of its columns), so that threads share even a single one.
template <typename W, typename Weights>
void answer(ffi::ThreadPool& pool, std::vector<Expert<W>>& experts, Weights weights, int64_t D, int64_t F,
            Activation activation) {
  bool gated = activation != Activation::SQUARE_OF_RELU;
  auto each_part = [&](int64_t columns, auto work) {
    int64_t wanted = PIECES * pool.num_threads() / std::max<int64_t>(experts.size(), 1) + 1;
    int64_t size = std::max<int64_t>(LEAST_COLUMNS, (columns / wanted + COLUMNS) / COLUMNS * COLUMNS);
    int64_t parts = (columns + size - 1) / size;
    spread(pool, experts.size() * parts, 1, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        work(experts[i / parts], i % parts * size, std::min((i % parts + 1) * size, columns));
    });
  };
  for (Expert<W>& each : experts) each.begin(gated ? 2 * F : F);
  each_part(F, [&](Expert<W>& e, int64_t first, int64_t last) {
    Matrix<W> gate_up = weights(e.slot).first;
    dots(e.x, gate_up, D, first, last, e.hidden.data());
    if (gated) dots(e.x, gate_up, D, F + first, F + last, e.hidden.data());
    for (float* row : e.hidden)
      if (activation == Activation::SWIGLU)
        gate_times<false>(row + first, row + F + first, last - first);
      else if (activation == Activation::GEGLU)
        gate_times<true>(row + first, row + F + first, last - first);
      else
        square_of_relu(row + first, last - first);
  });
  for (Expert<W>& e : experts) e.gated = meeting<W>(pool, {e.hidden.begin(), e.hidden.end()}, F, e.gated_room);
  each_part(D, [&](Expert<W>& e, int64_t first, int64_t last) {
    dots(e.gated, weights(e.slot).second, F, first, last, e.y.data());
  });
}

// Outputs [r, A, D] of the wanted slots [r, A] of layer `index`; each slot's weights are read once, for the rows that
// are routed to it and no others.
ffi::Error Experts(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> rows, ffi::Buffer<ffi::S32> wanted,
                   ffi::AnyBuffer gate_up_numbers, ffi::AnyBuffer gate_up_scale, ffi::AnyBuffer gate_up_more,
                   ffi::AnyBuffer down_numbers, ffi::AnyBuffer down_scale, ffi::AnyBuffer down_more,
                   ffi::Buffer<ffi::S32> index, ffi::ResultBuffer<ffi::F32> answers, int64_t gate_up_group,
                   int64_t down_group, int64_t gate_up_rows, int64_t down_rows, int64_t activation) {
  Weight gate_up = {gate_up_numbers, gate_up_scale, gate_up_more, gate_up_group, gate_up_rows};
  Weight down = {down_numbers, down_scale, down_more, down_group, down_rows};
  int64_t D = rows.dimensions()[1], A = wanted.dimensions()[1], items = wanted.element_count();
  int64_t S = down_numbers.dimensions()[1], above = gate_up_numbers.dimensions()[2];
  auto between = static_cast<Activation>(activation);
  int64_t F = between == Activation::SQUARE_OF_RELU ? above : above / 2;
  int64_t repeat = index.typed_data()[0];
  if (repeat < 0 || repeat >= down_numbers.dimensions()[0]) return ffi::Error::InvalidArgument("experts: no such layer");
  with_form(down, [&](auto number) {
    using W = decltype(number);
    std::vector<int16_t> room;
    std::vector<const float*> x;
    std::vector<int64_t> nth(items, -1);  // of the rows that want a slot, the number of each item's row
    for (int64_t item = 0, last = -1; item < items; ++item) {
      int64_t slot = wanted.typed_data()[item], row = item / A;
      if (slot < 0 || slot >= S) continue;
      if (row != last) x.push_back(rows.typed_data() + row * D);
      last = row;
      nth[item] = x.size() - 1;
    }
    std::vector<Row<W>> met = meeting<W>(pool, x, D, room);
    std::vector<Expert<W>> all(S), busy;
    for (int64_t item = 0; item < items; ++item) {
      float* answer = answers->typed_data() + item * D;
      if (nth[item] < 0) {
        std::fill(answer, answer + D, 0.0f);
        continue;
      }
      int64_t slot = wanted.typed_data()[item];
      all[slot].x.push_back(met[nth[item]]);
      all[slot].y.push_back(answer);
    }
    for (int64_t slot = 0; slot < S; ++slot) {
      all[slot].slot = slot;
      if (!all[slot].x.empty()) busy.push_back(std::move(all[slot]));
    }
    auto weights = [&](int64_t slot) {
      int64_t at = repeat * S + slot;
      return std::make_pair(matrix<W>(gate_up, at, above, D), matrix<W>(down, at, D, F));
    };
    answer<W>(pool, busy, weights, D, F, between);
  });
  return ffi::Error::Success();
}

// Numbers of keys and values in the cache, as `moejax.config.kv_cache` holds them: bits of fp8 are e4m3.
using ::widened;
using ::widened_one;

inline Vector widened(const bfloat16* p) { return load(p); }

inline float widened_one(bfloat16 x) { return single(&x); }

template <typename T>
void widen(const T* from, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(to + i, widened(from + i));
  for (; i < size; ++i) to[i] = widened_one(from[i]);
}

template <typename T>
constexpr bool SCALED = std::is_same_v<T, int8_t> || std::is_same_v<T, Float8>;

// Where keys and values of a block begin, and their scales, if they have some.
template <typename T>
struct Entries {
  const T *k[KEYS], *v[KEYS];
  const float *k_scale[KEYS], *v_scale[KEYS];
};

// The queries of one segment that share a key/value head: blocks of keys with a running maximum (arXiv 2205.14135).
// Keys and values narrower than float32 are widened once for all queries. A scale multiplies the sum of a key's products,
// and the weight of a value: the same numbers, whichever queries are together.
template <typename T>
struct Queries {
  int64_t H;
  std::vector<const float*> q;  // rows of H numbers, already scaled
  std::vector<int64_t> position;
  std::vector<float*> out;
  std::vector<float> maximum, sum, scores, wide;
  std::vector<float*> rows;

  void begin() {
    int64_t n = q.size();
    maximum.assign(n, -std::numeric_limits<float>::infinity());
    sum.assign(n, 0.0f);
    scores.resize(n * KEYS);
    if constexpr (!std::is_same_v<T, float>) wide.resize(2 * KEYS * H);
    rows = row_pointers(scores.data(), n, KEYS);
    for (float* row : out) std::fill(row, row + H, 0.0f);
  }

  // Keys and values at positions first .. first + KEYS. Those of `next` are prefetched meanwhile, a few at a time.
  void see(int64_t first, const Entries<T>& now, const Entries<T>& next, int64_t head) {
    const float *k[KEYS], *v[KEYS];
    int64_t n = q.size(), at = head * H;
    for (int64_t s = 0; s < KEYS; ++s) {
      if constexpr (std::is_same_v<T, float>) {
        k[s] = now.k[s] + at, v[s] = now.v[s] + at;
      } else {
        float *wide_k = wide.data() + 2 * s * H, *wide_v = wide_k + H;
        widen(now.k[s] + at, H, wide_k), widen(now.v[s] + at, H, wide_v);
        k[s] = wide_k, v[s] = wide_v;
      }
    }
    for (int64_t s = 0; s < KEYS; s += COLUMNS) {
      for (int64_t i = s; i < s + COLUMNS; ++i) ahead(next.k[i] + at, next.k[i] + at + H);
      tile_rows<COLUMNS>(q.data(), k + s, n, H, rows.data(), s);
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t s = i * KEYS / n; s < (i + 1) * KEYS / n; ++s) ahead(next.v[s] + at, next.v[s] + at + H);
      int64_t seen = std::min(KEYS, position[i] + 1 - first);
      if (seen <= 0) continue;
      if constexpr (SCALED<T>)
        for (int64_t s = 0; s < seen; ++s) rows[i][s] *= now.k_scale[s][head];
      mix(rows[i], v, seen, maximum[i], sum[i], out[i], [&](float* weights) {
        if constexpr (SCALED<T>)
          for (int64_t s = 0; s < seen; ++s) weights[s] *= now.v_scale[s][head];
      });
    }
  }

  void end() {
    for (size_t i = 0; i < q.size(); ++i)
      for (int64_t h = 0; h < H; ++h) out[i][h] = sum[i] > 0 ? out[i][h] / sum[i] : 0.0f;
  }

  // COUNT vectors side by side, each of which is a chain of sums.
  template <int COUNT>
  static void mix_at(const float* scores, const float* const* v, int64_t seen, Vector shrink, int64_t h, float* out) {
    Vector mixed[COUNT];
    for (int i = 0; i < COUNT; ++i) mixed[i] = load(out + h + i * LANES) * shrink;
    for (int64_t s = 0; s < seen; ++s) {
      Vector weight = all(scores[s]);
      for (int i = 0; i < COUNT; ++i) mixed[i] = fused(load(v[s] + h + i * LANES), weight, mixed[i]);
    }
    for (int i = 0; i < COUNT; ++i) store(out + h + i * LANES, mixed[i]);
  }

  template <typename Scale>
  void mix(float* scores, const float* const* v, int64_t seen, float& maximum, float& sum, float* out,
           Scale scale) const {
    float higher = maximum;
    for (int64_t s = 0; s < seen; ++s) higher = std::max(higher, scores[s]);
    for (int64_t s = seen; s < KEYS; ++s) scores[s] = -std::numeric_limits<float>::infinity();
    Vector shrink = exponential(all(maximum - higher)), weights[KEYS / LANES], added = {};
    for (int64_t b = 0; b < KEYS / LANES; ++b) {
      weights[b] = exponential(load(scores + b * LANES) - higher);
      store(scores + b * LANES, weights[b]);
      added += weights[b];
    }
    sum = sum * shrink[0] + total(added);
    maximum = higher;
    scale(scores);
    int64_t h = 0;
    for (; h + BESIDE * LANES <= H; h += BESIDE * LANES) mix_at<BESIDE>(scores, v, seen, shrink, h, out);
    for (; h + LANES <= H; h += LANES) mix_at<1>(scores, v, seen, shrink, h, out);
    for (; h < H; ++h) {
      float mixed = out[h] * shrink[0];
      for (int64_t s = 0; s < seen; ++s) mixed = fused(v[s][h], scores[s], mixed);
      out[h] = mixed;
    }
  }
};

// Keys or values of a step [R, K * H], or of the cache [L, entries, K * H], and their scales [..., K], if they have some.
struct HeldRows {
  ffi::AnyBuffer numbers;
  ffi::Buffer<ffi::F32> scale;
};

struct Attention {
  ffi::Buffer<ffi::F32> q;
  HeldRows k_new, v_new, k_pages, v_pages;
  ffi::Buffer<ffi::S32> layer, page_table, cached, new_base, positions;
  int64_t K, page_size;
  float scale;
};

// Those of a step, or of a layer of the cache.
template <typename T>
struct Rows {
  const T* numbers;
  const float* scale;

  Rows(const HeldRows& rows, int64_t first, int64_t K, int64_t H)
      : numbers(reinterpret_cast<const T*>(rows.numbers.untyped_data()) + first * K * H),
        scale(rows.scale.typed_data() + (SCALED<T> ? first * K : 0)) {}
};

// Outputs [Z, Q, N, H] over a cache of type T.
template <typename T>
ffi::Error attend(ffi::ThreadPool& pool, const Attention& a, float* out) {
  int64_t Z = a.q.dimensions()[0], Q = a.q.dimensions()[1], N = a.q.dimensions()[2], H = a.q.dimensions()[3];
  int64_t R = a.k_new.numbers.dimensions()[0], K = a.K, G = N / K, page_size = a.page_size;
  auto pages_of = a.k_pages.numbers.dimensions();
  int64_t L = pages_of[0], held = pages_of[1], M = a.page_table.dimensions()[1], at = a.layer.typed_data()[0];
  const float* q = a.q.typed_data();
  const int32_t* positions = a.positions.typed_data();
  if (at < 0 || at >= L) return ffi::Error::InvalidArgument("paged_attention: no such layer");
  Rows<T> new_keys(a.k_new, 0, K, H), new_values(a.v_new, 0, K, H);
  Rows<T> keys(a.k_pages, at * held, K, H), values(a.v_pages, at * held, K, H);
  // Heads of a segment stay together if there are enough segments: their keys are adjacent in memory.
  int64_t together = Z >= 2 * pool.num_threads() ? K : 1, parts = K / together;
  spread(pool, Z * parts, 1, 1, [&](int64_t first, int64_t last) {
    for (int64_t job = first; job < last; ++job) {
      int64_t z = job / parts, head = job % parts * together, longest = 0;
      const int32_t* pages = a.page_table.typed_data() + z * M;
      int64_t old = a.cached.typed_data()[z], base = a.new_base.typed_data()[z];
      std::vector<float> scaled(together * Q * G * H);
      std::vector<Queries<T>> heads(together, Queries<T>{H});
      for (int64_t i = 0; i < together * Q * G; ++i) {
        int64_t own = i / (Q * G), nth = i % (Q * G), n = (z * Q + nth / G) * N + (head + own) * G + nth % G;
        int64_t position = std::min<int64_t>(positions[z * Q + nth / G], M * page_size - 1);
        if (position < 0) {
          std::fill_n(out + n * H, H, 0.0f);
          continue;
        }
        for (int64_t h = 0; h < H; ++h) scaled[i * H + h] = q[n * H + h] * a.scale;
        longest = std::max(longest, position + 1);
        heads[own].q.push_back(scaled.data() + i * H);
        heads[own].position.push_back(position);
        heads[own].out.push_back(out + n * H);
      }
      for (Queries<T>& each : heads) each.begin();
      auto entries = [&](int64_t block) {
        Entries<T> found;
        for (int64_t s = 0; s < KEYS; ++s) {
          int64_t p = std::min(block + s, longest - 1);
          int64_t row = base + p - old, entry = pages[p / page_size] * page_size + p % page_size;
          bool fresh = p >= old;
          row = std::clamp<int64_t>(row, 0, R - 1), entry = std::clamp<int64_t>(entry, 0, held - 1);
          const Rows<T>&k = fresh ? new_keys : keys, &v = fresh ? new_values : values;
          int64_t first = (fresh ? row : entry) * K + head;
          found.k[s] = k.numbers + first * H, found.v[s] = v.numbers + first * H;
          if constexpr (SCALED<T>) found.k_scale[s] = k.scale + first, found.v_scale[s] = v.scale + first;
        }
        return found;
      };
      Entries<T> now, next = longest > 0 ? entries(0) : Entries<T>{};
      for (int64_t block = 0; block < longest; block += KEYS) {
        now = next, next = entries(block + KEYS);
        for (int64_t own = 0; own < together; ++own) heads[own].see(block, now, next, own);
      }
      for (Queries<T>& each : heads) each.end();
    }
  });
  return ffi::Error::Success();
}

// See moejax.model.attention.paged_attention for the arguments.
ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k_new,
                          ffi::Buffer<ffi::F32> k_new_scale, ffi::AnyBuffer v_new, ffi::Buffer<ffi::F32> v_new_scale,
                          ffi::AnyBuffer k_pages, ffi::Buffer<ffi::F32> k_scale, ffi::AnyBuffer v_pages,
                          ffi::Buffer<ffi::F32> v_scale, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> page_table,
                          ffi::Buffer<ffi::S32> cached, ffi::Buffer<ffi::S32> new_base,
                          ffi::Buffer<ffi::S32> positions, ffi::ResultBuffer<ffi::F32> out, int64_t kv_heads,
                          int64_t page_size, float scale) {
  Attention a{q,     {k_new, k_new_scale}, {v_new, v_new_scale}, {k_pages, k_scale}, {v_pages, v_scale}, layer, page_table,
              cached, new_base,            positions,            kv_heads,           page_size,          scale};
  switch (k_pages.element_type()) {
    case ffi::U16:
      return attend<bfloat16>(pool, a, out->typed_data());
    case ffi::S8:
      return attend<int8_t>(pool, a, out->typed_data());
    case ffi::U8:
      return attend<Float8>(pool, a, out->typed_data());
    default:
      return attend<float>(pool, a, out->typed_data());
  }
}

// Of each row of logits [Z, V] the first of the highest, and log(sum(exp(row))).
ffi::Error Likeliest(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::ResultBuffer<ffi::S32> tokens,
                     ffi::ResultBuffer<ffi::F32> normalizers) {
  int64_t Z = logits.dimensions()[0], V = logits.dimensions()[1];
  spread(pool, Z, 1, 1, [&](int64_t first, int64_t last) {
    for (int64_t z = first; z < last; ++z) {
      const float* row = logits.typed_data() + z * V;
      Vector high = all(-std::numeric_limits<float>::infinity()), sum = {};
      int64_t whole = V / LANES * LANES;
      for (int64_t v = 0; v < whole; v += LANES) high = load(row + v) > high ? load(row + v) : high;
      float highest = high[0];
      for (int i = 1; i < LANES; ++i) highest = std::max(highest, high[i]);
      for (int64_t v = whole; v < V; ++v) highest = std::max(highest, row[v]);
      for (int64_t v = 0; v < whole; v += LANES) sum += exponential(load(row + v) - highest);
      float rest[LANES];
      std::fill(rest, rest + LANES, -std::numeric_limits<float>::infinity());
      std::copy(row + whole, row + V, rest);
      sum += exponential(load(rest) - highest);
      tokens->typed_data()[z] = std::find(row, row + V, highest) - row;
      normalizers->typed_data()[z] = highest + std::log(total(sum));
    }
  });
  return ffi::Error::Success();
}

// Of each row the first of the highest of logits [Z, V] / temperature [Z] + Gumbel noise of the row's key [Z, 2]; 0
// where the temperature is 0.
ffi::Error Drawn(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::F32> temperature,
                 ffi::Buffer<ffi::U32> keys, ffi::ResultBuffer<ffi::S32> tokens) {
  int64_t Z = logits.dimensions()[0], V = logits.dimensions()[1];
  Integers lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  spread(pool, Z, 1, 1, [&](int64_t first, int64_t last) {
    for (int64_t z = first; z < last; ++z) {
      tokens->typed_data()[z] = 0;
      float heat = temperature.typed_data()[z];
      if (!(heat > 0)) continue;
      const float* row = logits.typed_data() + z * V;
      const uint32_t* key = keys.typed_data() + 2 * z;
      Vector most = all(-std::numeric_limits<float>::infinity());
      Integers best = {};
      for (int64_t v = 0; v < V; v += LANES) {
        float rest[LANES];
        if (v + LANES > V) {
          std::fill(rest, rest + LANES, -std::numeric_limits<float>::infinity());
          std::copy(row + v, row + V, rest);
        }
        Integers at = lanes + static_cast<int32_t>(v);
        Vector x = load(v + LANES > V ? rest : row + v) / heat + gumbel(key[0], key[1], reinterpret_cast<Words&>(at));
        best = x > most ? at : best;
        most = x > most ? x : most;
      }
      int chosen = 0;
      for (int i = 1; i < LANES; ++i)
        if (most[i] > most[chosen] || (most[i] == most[chosen] && best[i] < best[chosen])) chosen = i;
      tokens->typed_data()[z] = best[chosen];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_drawn, Drawn,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_likeliest, Likeliest,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_row_dot, RowDot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("rows"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_experts, Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("gate_up_group")
                                  .Attr<int64_t>("down_group")
                                  .Attr<int64_t>("gate_up_rows")
                                  .Attr<int64_t>("down_rows")
                                  .Attr<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_paged_attention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<int64_t>("page_size")
                                  .Attr<float>("scale"));
