// Vectors of the width of the instruction set that this file is compiled for, through the compiler's vector types;
// conversions by intrinsics, for the compiler's own go through the stack.
//
// Everything lies in an unnamed namespace: each of the three instruction sets has its own copy of the code, and the
// linker must never merge an AVX-512 instance into the baseline.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace bucketmoo {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // floats in a register
constexpr int kTileColumns = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileColumns = 2;
#else
constexpr int kLanes = 4;
constexpr int kTileColumns = 2;
#endif

typedef float FloatVector __attribute__((vector_size(kLanes * sizeof(float))));
typedef double DoubleVector __attribute__((vector_size(kLanes * sizeof(float))));  // half as many lanes
typedef uint32_t WordVector __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// As many float64 lanes as a FloatVector has.
struct Wide {
  DoubleVector low, high;
};

template <class Vector, class T>
inline Vector load_unaligned(const T* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class Vector, class T>
inline void store_unaligned(T* to, Vector value) {
  std::memcpy(to, &value, sizeof(value));
}

inline Wide widen(FloatVector value) {
#if defined(__AVX512F__)
  const __m512 all = (__m512)value;
  return {(DoubleVector)_mm512_cvtps_pd(_mm512_castps512_ps256(all)),
          (DoubleVector)_mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1))};
#elif defined(__AVX2__)
  const __m256 all = (__m256)value;
  return {(DoubleVector)_mm256_cvtps_pd(_mm256_castps256_ps128(all)),
          (DoubleVector)_mm256_cvtps_pd(_mm256_extractf128_ps(all, 1))};
#else
  return {DoubleVector{value[0], value[1]}, DoubleVector{value[2], value[3]}};
#endif
}

inline FloatVector narrow(Wide value) {
#if defined(__AVX512F__)
  const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)value.low));
  return (FloatVector)_mm512_insertf32x8(low, _mm512_cvtpd_ps((__m512d)value.high), 1);
#elif defined(__AVX2__)
  const __m256 low = _mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)value.low));
  return (FloatVector)_mm256_insertf128_ps(low, _mm256_cvtpd_ps((__m256d)value.high), 1);
#else
  return FloatVector{static_cast<float>(value.low[0]), static_cast<float>(value.low[1]),
                     static_cast<float>(value.high[0]), static_cast<float>(value.high[1])};
#endif
}

inline Wide operator+(Wide a, Wide b) { return {a.low + b.low, a.high + b.high}; }
inline Wide operator*(double a, Wide b) { return {a * b.low, a * b.high}; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What a register holds of elements of a type: float32, or float64.
inline DoubleVector load(const double* from) { return load_unaligned<DoubleVector>(from); }

inline FloatVector load(const float* from) { return load_unaligned<FloatVector>(from); }

// A float32 that is loaded as float64.
struct WideFloat {
  float value;
};

inline DoubleVector load(const WideFloat* from) {
#if defined(__AVX512F__)
  return (DoubleVector)_mm512_cvtps_pd(_mm256_loadu_ps(&from->value));
#elif defined(__AVX2__)
  return (DoubleVector)_mm256_cvtps_pd(_mm_loadu_ps(&from->value));
#else
  return DoubleVector{from[0].value, from[1].value};
#endif
}

inline FloatVector load(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (FloatVector)_mm512_slli_epi32(words, 16);
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return (FloatVector)_mm256_slli_epi32(words, 16);
#else
  const WordVector words = {from[0].bits, from[1].bits, from[2].bits, from[3].bits};
  return (FloatVector)(words << 16);
#endif
}

inline FloatVector load(const Float16* from) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (FloatVector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  FloatVector value;
  for (int lane = 0; lane < kLanes; ++lane) {
    _Float16 half;
    std::memcpy(&half, from + lane, sizeof(half));
    value[lane] = static_cast<float>(half);
  }
  return value;
#endif
}

inline Wide load_wide(const double* from) {
  return {load_unaligned<DoubleVector>(from), load_unaligned<DoubleVector>(from + kLanes / 2)};
}

template <class Row>
inline Wide load_wide(const Row* from) {
  return widen(load(from));
}

inline void store(float* to, FloatVector value) { store_unaligned(to, value); }

// To nearest, ties to even; a NaN stays one.
inline void store(BFloat16* to, FloatVector value) {
  const WordVector words = (WordVector)value;
  const WordVector rounded = (words + (0x7fff + ((words >> 16) & 1))) >> 16;
  const WordVector is_nan = (WordVector)(value != value);
  const WordVector result = (is_nan & 0x7fc0) | (~is_nan & rounded);
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)result));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)result), high = _mm256_extracti128_si256((__m256i)result, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
#else
  for (int lane = 0; lane < kLanes; ++lane) to[lane].bits = static_cast<uint16_t>(result[lane]);
#endif
}

inline void store(Float16* to, FloatVector value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const _Float16 half = static_cast<_Float16>(value[lane]);
    std::memcpy(to + lane, &half, sizeof(half));
  }
#endif
}

inline void store(double* to, Wide value) {
  store_unaligned(to, value.low);
  store_unaligned(to + kLanes / 2, value.high);
}

template <class T>
inline void store(T* to, Wide value) {
  store(to, narrow(value));
}

// Sums over lanes, of kFold vectors at once: each is added up in float32 as the same tree, halves onto halves, and that
// to its total in float64. Shuffles of two vectors leave half of the lanes of both in one, so that no lane idles.
constexpr int kFold = kLanes < 8 ? 4 : 8;
typedef float FoldedVector __attribute__((vector_size(kFold * sizeof(float))));

#if defined(__AVX2__)
inline FoldedVector halves(FoldedVector a, FoldedVector b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
inline FoldedVector quarters(FoldedVector a, FoldedVector b) {
  return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
         __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
inline FoldedVector eighths(FoldedVector a, FoldedVector b) {
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
#if defined(__AVX512F__)
inline FoldedVector folded(FloatVector value) {
  const __m512 all = (__m512)value;
  return (FoldedVector)_mm512_castps512_ps256(all) + (FoldedVector)_mm512_extractf32x8_ps(all, 1);
}
#else
inline FoldedVector folded(FloatVector value) { return value; }
#endif

inline FoldedVector fold(const FloatVector* sums) {
  FoldedVector pairs[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) pairs[i] = halves(folded(sums[i]), folded(sums[i + 4]));
  return eighths(quarters(pairs[0], pairs[1]), quarters(pairs[2], pairs[3]));
}
#else
inline FoldedVector fold(const FloatVector* sums) {
  const auto halves = [](FoldedVector a, FoldedVector b) {
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  };
  const FoldedVector low = halves(sums[0], sums[1]), high = halves(sums[2], sums[3]);
  return __builtin_shufflevector(low, high, 0, 2, 4, 6) + __builtin_shufflevector(low, high, 1, 3, 5, 7);
}
#endif

inline void add_folded(const FloatVector* sums, double* totals) {
  const FoldedVector sum = fold(sums);
#if defined(__AVX512F__)
  store_unaligned(totals, load_unaligned<DoubleVector>(totals) + (DoubleVector)_mm512_cvtps_pd((__m256)sum));
#else
  store(totals, load_wide(totals) + widen(sum));
#endif
}

inline void add_folded(const DoubleVector* sums, double* totals) {
  for (int i = 0; i < kFold; ++i) {
    double lanes[kLanes / 2];
    store_unaligned(lanes, sums[i]);
    for (int half = kLanes / 4; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    totals[i] += lanes[0];
  }
}

}  // namespace
}  // namespace bucketmoo
