// bfloat16 and float16 as 16-bit words, rounded to nearest even as PyTorch does.
#pragma once

#include "scalar.h"

namespace distruction {

DISTRUCTION_FN float bfloat16_to_float(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }

DISTRUCTION_FN uint16_t float_to_bfloat16(float value) {
  const uint32_t x = as_word(value);
  if ((x & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<uint16_t>((x + 0x7FFFu + ((x >> 16) & 1u)) >> 16);
}

// Adds the word's low 16 bits below bfloat16's last place and truncates: the expected result is `value`. The sum of a NaN
// could be infinity or, past the last word, zero.
DISTRUCTION_FN uint16_t float_to_bfloat16_stochastic(float value, uint32_t word) {
  if ((as_word(value) & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<uint16_t>((as_word(value) + (word & 0xFFFFu)) >> 16);
}

DISTRUCTION_FN float float16_to_float(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, magnitude = static_cast<uint32_t>(x & 0x7FFFu) << 13;
  if (magnitude >= 0x0F800000u) return as_float(sign | 0x70000000u | magnitude);  // infinite or NaN
  if (magnitude >= 0x00800000u) return as_float(sign | (magnitude + 0x38000000u));
  // Subnormal: an addition to 2**-14, whose last place is below theirs, and back. No number on the way is a subnormal
  // float, which a compiler's or a processor's mode may take for zero.
  return as_float(sign | as_word(as_float(0x38800000u | magnitude) - 0x1p-14f));
}

DISTRUCTION_FN uint16_t float_to_float16(float value) {
  const uint32_t sign = (as_word(value) >> 16) & 0x8000u;
  uint32_t x = as_word(value) & 0x7FFFFFFFu;
  if (x > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (x >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (x < 0x38800000u) {
    // Subnormal: next to 1/2 the last place of a float is that of the subnormal numbers, so the addition rounds.
    return static_cast<uint16_t>(sign | (as_word(as_float(x) + 0.5f) - 0x3F000000u));
  }
  x += 0xFFFu + ((x >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((x - 0x38000000u) >> 13));
}

}  // namespace distruction
