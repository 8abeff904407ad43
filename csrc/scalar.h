// Primitives on one float or one 32-bit word. The maths of the other headers is written once, as templates over
// these and over the vector types of cpu/vector.h; g++ and nvcc compile both.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

// Internal linkage throughout: the CPU kernels are compiled once per instruction set, and the linker must not
// let one set's copy of a function serve another's.
#if defined(__CUDACC__)
#define DISTRUCTION_FN static __host__ __device__ __forceinline__
#else
#define DISTRUCTION_FN static inline __attribute__((always_inline))
#endif

#define DISTRUCTION_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__) || defined(__clang__)
#define DISTRUCTION_UNROLL(times) DISTRUCTION_PRAGMA(unroll)
#else
#define DISTRUCTION_UNROLL(times) DISTRUCTION_PRAGMA(GCC unroll times)
#endif

// A compiler may not know where x comes from.
#if defined(__x86_64__) && defined(__AVX512F__)
#define DISTRUCTION_OPAQUE(x) __asm__("" : "+v"(x))
#elif defined(__x86_64__)
#define DISTRUCTION_OPAQUE(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__)
#define DISTRUCTION_OPAQUE(x) __asm__("" : "+w"(x))
#else
#define DISTRUCTION_OPAQUE(x) __asm__("" : "+m"(x))
#endif

namespace distruction {

DISTRUCTION_FN float as_float(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(word);
#else
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
#endif
}

DISTRUCTION_FN uint32_t as_word(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return word;
#endif
}

DISTRUCTION_FN int32_t as_int(uint32_t word) { return static_cast<int32_t>(word); }
DISTRUCTION_FN uint32_t as_word(int32_t value) { return static_cast<uint32_t>(value); }
DISTRUCTION_FN float to_float(int32_t value) { return static_cast<float>(value); }
DISTRUCTION_FN int32_t truncated(float value) { return static_cast<int32_t>(value); }
DISTRUCTION_FN bool all(bool mask) { return mask; }
DISTRUCTION_FN bool all_below(float value, float bound) { return value < bound; }
DISTRUCTION_FN float square_root(float value) { return sqrtf(value); }
DISTRUCTION_FN float reciprocal(float value) { return 1.0f / value; }

// 1 / value correctly rounded, whatever the compiler's flags say of divisions: that of a power of two is exact.
DISTRUCTION_FN float inverse(float value) {
#if defined(__CUDA_ARCH__)
  return __frcp_rn(value);
#else
  return 1.0f / value;
#endif
}

// a * b rounded by itself, which no compiler fuses with an addition.
DISTRUCTION_FN float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  float x = a * b;
  DISTRUCTION_OPAQUE(x);
  return x;
#endif
}

// The 64-bit product of two words, as its high and its low word.
DISTRUCTION_FN void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
  high = __umulhi(a, b);
  low = a * b;
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
#endif
}

}  // namespace distruction
