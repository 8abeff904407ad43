// Standard deviations from 8-bit codes, bit for bit as distruction/ops/reference/codes.py restores them: no multiplication
// is fused with an addition.
#pragma once

#include "scalar.h"

namespace distruction {

// Elements that share `low` and `step`, by their flat index in the whole parameter.
constexpr int kCodesPerBlock = 1024;

// The factor of a block's codes in an exponent of 2.
DISTRUCTION_FN float rate_of(float step) { return product(step, 1.4426950408889634f); }

// low * 2**(code * rate), `code` as a float; `low` is a normal number.
template <class F>
DISTRUCTION_FN F decode(F code, F low, F rate) {
  const F t = product(code, rate);
  const auto exponent = truncated(t);
  const F f = t - to_float(exponent);
  F p = product(f, F{} + 0.0018671330763027072f) + 0.00901702418923378f;
  p = product(p, f) + 0.05579991638660431f;
  p = product(p, f) + 0.24016444385051727f;
  p = product(p, f) + 0.6931512951850891f;
  p = product(p, f) + 1.0f;
  return as_float(as_word(product(p, low)) + (as_word(exponent) << 23));
}

}  // namespace distruction
