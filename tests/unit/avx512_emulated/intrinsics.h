// The AVX-512 intrinsics that csrc/cpu/vector.h uses, by the compiler's vector types: it lowers 64-byte vectors to what
// the machine has. So the code for 16 lanes runs, slowly, where there is no AVX-512.
#pragma once

#include <immintrin.h>

namespace emulated {

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int Ints __attribute__((vector_size(64)));
typedef unsigned short Shorts __attribute__((vector_size(32)));
typedef short SignedShorts __attribute__((vector_size(32)));

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Half, class Whole>
Half half(Whole whole, int which) {
  Half part;
  __builtin_memcpy(&part, reinterpret_cast<const char*>(&whole) + which * sizeof(Half), sizeof(Half));
  return part;
}

template <class Whole, class Half>
Whole join(Half low, Half high) {
  Whole whole;
  __builtin_memcpy(&whole, &low, sizeof(Half));
  __builtin_memcpy(reinterpret_cast<char*>(&whole) + sizeof(Half), &high, sizeof(Half));
  return whole;
}

inline __m256 castps512_ps256(__m512 a) { return half<__m256>(a, 0); }
inline __m512 castps256_ps512(__m256 a) { return join<__m512>(a, _mm256_set1_ps(__builtin_nanf(""))); }
inline __m256 extractf32x8_ps(__m512 a, int which) { return half<__m256>(a, which); }
inline __m512 insertf32x8(__m512 a, __m256 b, int which) {
  return which == 1 ? join<__m512>(half<__m256>(a, 0), b) : join<__m512>(b, half<__m256>(a, 1));
}
inline __m512d cvtps_pd(__m256 a) { return bits<__m512d>(__builtin_convertvector(a, Doubles)); }
inline __m256 cvtpd_ps(__m512d a) {
  typedef float Half __attribute__((vector_size(32)));
  return bits<__m256>(__builtin_convertvector(bits<Doubles>(a), Half));
}
inline __m512i cvtepu16_epi32(__m256i a) { return bits<__m512i>(__builtin_convertvector(bits<Shorts>(a), Ints)); }
inline __m512i slli_epi32(__m512i a, unsigned by) { return bits<__m512i>(bits<Ints>(a) << static_cast<int>(by)); }
inline __m256i cvtepi32_epi16(__m512i a) {
  return bits<__m256i>(__builtin_convertvector(bits<Ints>(a), SignedShorts));
}
inline __m512 cvtph_ps(__m256i a) {
  return join<__m512>(_mm256_cvtph_ps(half<__m128i>(a, 0)), _mm256_cvtph_ps(half<__m128i>(a, 1)));
}
inline __m256i cvtps_ph(__m512 a) {
  const __m128i low = _mm256_cvtps_ph(half<__m256>(a, 0), _MM_FROUND_TO_NEAREST_INT);
  return join<__m256i>(low, _mm256_cvtps_ph(half<__m256>(a, 1), _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace emulated

#undef _mm512_extractf32x8_ps
#undef _mm512_insertf32x8
#undef _mm512_slli_epi32
#undef _mm512_cvtps_ph
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_castps256_ps512 emulated::castps256_ps512
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_insertf32x8 emulated::insertf32x8
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_cvtpd_ps emulated::cvtpd_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(value, rounding) emulated::cvtps_ph(value)
#define __AVX512F__ 1
