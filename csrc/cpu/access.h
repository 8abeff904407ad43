// Arrays in vectors: whole ones and an array's last, and arrays of fewer than 32 bits as floats and back.
#pragma once

#include "vector.h"  // first: the templates of the next find its overloads

#include "../codes.h"
#include "../model.h"

namespace distruction {
namespace {

// Access to a whole vector, and to the first `count` lanes of one at an array's end.
struct Full {
  template <class V, class T>
  inline __attribute__((always_inline)) V load(const T* p, V) const {
    return distruction::load<V>(p);
  }
  template <class T, class V>
  inline __attribute__((always_inline)) void store(T* p, V x) const {
    distruction::store(p, x);
  }
  inline __attribute__((always_inline)) void store_sample(float* p, Float x, bool streamed) const {
    if (streamed)
      stream(p, x);
    else
      distruction::store(p, x);
  }
  template <class V>
  inline __attribute__((always_inline)) V used(V x) const {
    return x;
  }
};

struct Partial {
  int count;
  template <class V, class T>
  inline __attribute__((always_inline)) V load(const T* p, V fill) const {
    memcpy(&fill, p, static_cast<size_t>(count) * sizeof(T));
    return fill;
  }
  template <class T, class V>
  inline __attribute__((always_inline)) void store(T* p, V x) const {
    memcpy(p, &x, static_cast<size_t>(count) * sizeof(T));
  }
  inline __attribute__((always_inline)) void store_sample(float* p, Float x, bool) const { store(p, x); }
  template <class V>
  inline __attribute__((always_inline)) V used(V x) const {
    for (int i = count; i < kLanes; ++i) x[i] = 0;
    return x;
  }
};

// Calls f(access, index) over [0, n) in vectors.
template <class F>
DISTRUCTION_FN void for_each_vector(int n, F f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) f(Full{}, i);
  if (i < n) f(Partial{n - i}, i);
}

// Gradients of 16 bits as floats.
DISTRUCTION_NOINLINE void widen(const uint16_t* p, int64_t type, int n, float* __restrict out) {
  if (type == kBFloat16)
    for_each_vector(n, [=](auto access, int i) {
      access.store(out + i, bfloat16_to_float(access.load(p + i, Short{})));
    });
  else
    for_each_vector(n, [=](auto access, int i) {
      access.store(out + i, float16_to_float(access.load(p + i, Short{})));
    });
}

// Standard deviations of codes that share a block.
DISTRUCTION_NOINLINE void restore(const uint8_t* codes, float low, float rate, int n, float* __restrict out) {
  for_each_vector(n, [=](auto access, int i) {
    const Float code = to_float(access.load(codes + i, Byte{}));
    access.store(out + i, decode(code, splat<Float>(low), splat<Float>(rate)));
  });
}

// Samples in 16 bits; `words`, where given, round them stochastically.
DISTRUCTION_NOINLINE void narrow(
    uint16_t* p, int64_t type, int n, const float* __restrict theta, const uint32_t* __restrict words) {
  if (type == kFloat16)
    for_each_vector(n, [=](auto access, int i) {
      access.store(p + i, float_to_float16(access.load(theta + i, Float{})));
    });
  else if (words)
    for_each_vector(n, [=](auto access, int i) {
      const Word word = access.load(words + i, Word{});
      access.store(p + i, float_to_bfloat16_stochastic(access.load(theta + i, Float{}), word));
    });
  else
    for_each_vector(n, [=](auto access, int i) {
      access.store(p + i, float_to_bfloat16(access.load(theta + i, Float{})));
    });
}

}  // namespace
}  // namespace distruction
