// The primitives of scalar.h for vectors of floats and words, by the compiler's vector extension: as wide as the
// instruction set that the including file is compiled for.
#pragma once

#include "../conversions.h"
#include "../scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DISTRUCTION_NOINLINE static __attribute__((noinline))

namespace distruction {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Float __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Word __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Wide __attribute__((vector_size(4 * kLanes)));  // half as many lanes
typedef double Double __attribute__((vector_size(4 * kLanes)));
typedef float HalfFloat __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Short __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Byte __attribute__((vector_size(kLanes)));

DISTRUCTION_FN Float as_float(Word x) { return (Float)x; }
DISTRUCTION_FN Word as_word(Float x) { return (Word)x; }
DISTRUCTION_FN Word as_word(Int x) { return (Word)x; }
DISTRUCTION_FN Int as_int(Word x) { return (Int)x; }
DISTRUCTION_FN Float to_float(Int x) { return __builtin_convertvector(x, Float); }
DISTRUCTION_FN Float to_float(Byte x) { return __builtin_convertvector(__builtin_convertvector(x, Int), Float); }
DISTRUCTION_FN Int truncated(Float x) { return __builtin_convertvector(x, Int); }

DISTRUCTION_FN Float square_root(Float x) {
#if defined(__AVX512F__)
  return (Float)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Float)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Float)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = sqrtf(x[i]);
  return x;
#endif
}

DISTRUCTION_FN Float product(Float a, Float b) {
  Float x = a * b;
  DISTRUCTION_OPAQUE(x);
  return x;
}

DISTRUCTION_FN bool all_below(Float x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_LT_OQ) == 0xFFFF;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(x < bound)) == 0xFF;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)(x < bound)) == 0xF;
#else
  for (int i = 0; i < kLanes; ++i)
    if (!(x[i] < bound)) return false;
  return true;
#endif
}

// Of a comparison, whose lanes are 0 or -1.
DISTRUCTION_FN bool all(Int mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) == 0xFFFF;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) == 0xFF;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) == 0xF;
#else
  for (int i = 0; i < kLanes; ++i)
    if (!mask[i]) return false;
  return true;
#endif
}

// One Newton step on AVX-512's 14-bit estimate is good to 1 ulp and far cheaper than a division.
DISTRUCTION_FN Float reciprocal(Float x) {
#if defined(__AVX512F__)
  const Float estimate = (Float)_mm512_rcp14_ps((__m512)x);
  return estimate + estimate * (1.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

// Products of the low halves of the 64-bit lanes; the low word carries the high one in its unused half.
DISTRUCTION_FN void multiply_wide(Wide a, uint32_t b, Wide& high, Wide& low) {
#if defined(__AVX512F__)
  low = (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  low = (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  low = (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  low = (a & 0xFFFFFFFFu) * static_cast<uint64_t>(b);
#endif
  high = low >> 32;
}

DISTRUCTION_FN Double to_double(Float x) {
#if defined(__AVX512F__)
  const __m512 v = (__m512)x;
  return (Double)_mm512_cvtps_pd(_mm512_castps512_ps256(v)) + (Double)_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
  const __m256 v = (__m256)x;
  return (Double)_mm256_cvtps_pd(_mm256_castps256_ps128(v)) + (Double)_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
#else
  HalfFloat half[2];
  memcpy(half, &x, sizeof x);
  return __builtin_convertvector(half[0], Double) + __builtin_convertvector(half[1], Double);
#endif
}

template <class V, class T>
DISTRUCTION_FN V load(const T* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}

template <class V, class T>
DISTRUCTION_FN void store(T* p, V x) {
  memcpy(p, &x, sizeof x);
}

// Past the caches: `p`, aligned to the vector, is not read before it is written, nor kept.
DISTRUCTION_FN void stream(float* p, Float x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}

// Makes what was streamed visible to other threads in the order of the program.
DISTRUCTION_FN void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

DISTRUCTION_FN Float bfloat16_to_float(Short x) { return as_float(__builtin_convertvector(x, Word) << 16); }

DISTRUCTION_FN Short float_to_bfloat16(Float value) {
  const Word x = as_word(value);
  const Word rounded = (x + 0x7FFFu + ((x >> 16) & 1u)) >> 16;
  return __builtin_convertvector(value == value ? rounded : rounded * 0u + 0x7FC0u, Short);
}

DISTRUCTION_FN Short float_to_bfloat16_stochastic(Float value, Word word) {
  const Word rounded = (as_word(value) + (word & 0xFFFFu)) >> 16;
  return __builtin_convertvector(value == value ? rounded : rounded * 0u + 0x7FC0u, Short);
}

DISTRUCTION_FN Float float16_to_float(Short x) {
#if defined(__AVX512F__)
  return (Float)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (Float)_mm256_cvtph_ps((__m128i)x);
#else
  Float value;
  for (int i = 0; i < kLanes; ++i) value[i] = float16_to_float(static_cast<uint16_t>(x[i]));
  return value;
#endif
}

DISTRUCTION_FN Short float_to_float16(Float value) {
#if defined(__AVX512F__)
  return (Short)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Short)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  Short x;
  for (int i = 0; i < kLanes; ++i) x[i] = float_to_float16(static_cast<float>(value[i]));
  return x;
#endif
}

#if defined(__clang__)
#define DISTRUCTION_PERMUTE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DISTRUCTION_PERMUTE(a, b, ...) __builtin_shuffle(a, b, (Int){__VA_ARGS__})
#endif

// Interleaves the lower or upper pairs of each 128 bits of two vectors, by single lanes or by pairs of lanes.
template <bool upper>
DISTRUCTION_FN Word interleave(Word a, Word b) {
#if defined(__AVX512F__)
  return (Word)(upper ? _mm512_unpackhi_epi32((__m512i)a, (__m512i)b) : _mm512_unpacklo_epi32((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
  return (Word)(upper ? _mm256_unpackhi_epi32((__m256i)a, (__m256i)b) : _mm256_unpacklo_epi32((__m256i)a, (__m256i)b));
#else
  return upper ? DISTRUCTION_PERMUTE(a, b, 2, 6, 3, 7) : DISTRUCTION_PERMUTE(a, b, 0, 4, 1, 5);
#endif
}

template <bool upper>
DISTRUCTION_FN Word interleave_pairs(Word a, Word b) {
#if defined(__AVX512F__)
  return (Word)(upper ? _mm512_unpackhi_epi64((__m512i)a, (__m512i)b) : _mm512_unpacklo_epi64((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
  return (Word)(upper ? _mm256_unpackhi_epi64((__m256i)a, (__m256i)b) : _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
#else
  return upper ? DISTRUCTION_PERMUTE(a, b, 2, 3, 6, 7) : DISTRUCTION_PERMUTE(a, b, 0, 1, 4, 5);
#endif
}

}  // namespace distruction
