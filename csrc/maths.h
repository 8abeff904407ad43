// Functions of one number: bounds that keep a NaN, and logarithms that do not cancel.
//
// Templates over F = float or a vector of floats; comparisons give masks for `?:` in both cases. Include the primitives
// of the type to instantiate them with first: scalar.h or cpu/vector.h.
#pragma once

#include "scalar.h"

namespace distruction {

// Vectors branch to the shorter formula where it holds for every lane; one by one, in a GPU's threads, the branch would
// cost more than it saves.
template <class F>
constexpr bool kShortcuts = sizeof(F) > sizeof(float);

template <class F>
DISTRUCTION_FN F absolute(F x) {
  return as_float(as_word(x) & 0x7FFFFFFFu);
}

template <class F>
DISTRUCTION_FN F splat(float value) {
  return F{} + value;
}

// min and max that keep a NaN in x, as torch.clamp does.
template <class F>
DISTRUCTION_FN F at_most(F x, F bound) {
  return bound < x ? bound : x;
}

template <class F>
DISTRUCTION_FN F at_least(F x, F bound) {
  return bound > x ? bound : x;
}

// x = 2**exponent * (1 + f) with f in [-1/3, 1/3).
template <class F, class I>
DISTRUCTION_FN void split(F x, I& exponent, F& f) {
  exponent = as_int(as_word(x) - 0x3F2AAAABu) >> 23;
  f = as_float(as_word(x) - (as_word(exponent) << 23)) - 1.0f;
}

// f - log(1 + f) for f in [-1/3, 1/3], relative error 3e-7: a minimax polynomial times f**2, so that nothing cancels.
template <class F>
DISTRUCTION_FN F f_minus_log1p(F f) {
  F p = 0.15076413750648499f - 0.13633877038955688f * f;
  p = p * f - 0.14079158008098602f;
  p = p * f + 0.16477879881858826f;
  p = p * f - 0.20005875825881958f;
  p = p * f + 0.25004327297210693f;
  p = p * f - 0.33333292603492737f;
  p = p * f + 0.49999985098838806f;
  return f * f * p;
}

static constexpr float kLog2 = 0.6931471805599453f;

// -log2(x) for normal positive x, relative error 1.1e-6 before rounding also as x tends to 1: a minimax polynomial times f.
template <class F>
DISTRUCTION_FN F minus_log2(F x) {
  decltype(as_int(as_word(x))) exponent;
  F f;
  split(x, exponent, f);
  F p = 0.27990007400512695f - 0.24624484777450562f * f;
  p = p * f - 0.2856760025024414f;
  p = p * f + 0.3584042191505432f;
  p = p * f - 0.4809626042842865f;
  p = p * f + 0.7213793396949768f;
  p = p * f - 1.4426947832107544f;
  return p * f - to_float(exponent);
}

}  // namespace distruction
