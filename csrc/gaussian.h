// The maths of the library: Box-Muller, the BGD update, the KL divergence. Formulas and sources are in
// distruction/ops/reference/{philox,step,gauss_newton,kl}.py, which these functions follow line by line.
//
// Templates over F = float or a vector of floats; comparisons give masks for `?:` in both cases.
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

// log(x) for normal positive x; its relative error stays small as x tends to 1.
template <class F>
DISTRUCTION_FN F log_positive(F x) {
  decltype(as_int(as_word(x))) exponent;
  F f;
  split(x, exponent, f);
  return to_float(exponent) * kLog2 + (f - f_minus_log1p(f));
}

// sin(pi x) for x in [-1/2, 1/2], relative error 6e-9 before rounding.
template <class F>
DISTRUCTION_FN F sin_pi(F x) {
  const F x2 = x * x;
  F p = 0.0775604099035263f * x2 - 0.5982421636581421f;
  p = p * x2 + 2.550069808959961f;
  p = p * x2 - 5.167709827423096f;
  p = p * x2 + 3.1415927410125732f;
  return x * p;
}

// float32((word + 1/2) * 2**-32), rounded once: both halves are exact until they meet.
template <class W>
DISTRUCTION_FN auto uniform(W word) -> decltype(as_float(word)) {
  return to_float(as_int(word >> 16)) * 0x1p-16f + (to_float(as_int(word & 0xFFFFu)) * 0x1p-32f + 0x1p-33f);
}

// Two independent standard normals, times sign. The angle covers the half turn where the cosine is positive; the
// angle word's lowest bit mirrors it.
template <class W, class F>
DISTRUCTION_FN void box_muller(W radius_word, W angle_word, float sign, F& cosine, F& sine) {
  const F radius = square_root(-2.0f * log_positive(uniform(radius_word))) * sign;
  const F turn = to_float(as_int(angle_word)) * 0x1p-32f;
  cosine = as_float(as_word(radius * sin_pi(0.5f - absolute(turn))) ^ (angle_word << 31));
  sine = radius * sin_pi(turn);
}

// KL(N(mean, std**2) || N(prior_mean, prior_std**2)) in terms of the differences dm = (mean - prior_mean) / prior_std,
// d = (std - prior_std) / prior_std and ratio = std / prior_std.
template <class F>
DISTRUCTION_FN F kl_value(F dm, F d, F ratio) {
  F d_minus_log;
  if (kShortcuts<F> && all_below(absolute(d), 0.33f)) {
    d_minus_log = f_minus_log1p(d);
  } else {
    decltype(as_int(as_word(d))) exponent;
    F f;
    split(ratio, exponent, f);
    // Near the prior d keeps the digits that ratio - 1 has lost, and the first two terms are zero.
    f = exponent == 0 ? d : f;
    d_minus_log = d - f - to_float(exponent) * kLog2 + f_minus_log1p(f);
    d_minus_log = ratio == 0.0f ? splat<F>(INFINITY) : d_minus_log;
  }
  return 0.5f * (dm * dm + d * d) + d_minus_log;
}

// The KL of one element, dKL/dmean and dKL/dstd.
template <class F>
DISTRUCTION_FN void kl_with_gradients(F mean, F std, F prior_mean, F prior_std, F& kl, F& grad_mean, F& grad_std) {
  const F inverse_prior = reciprocal(prior_std);
  const F dm = (mean - prior_mean) * inverse_prior, d = (std - prior_std) * inverse_prior;
  kl = kl_value(dm, d, std * inverse_prior);
  grad_mean = dm * inverse_prior;
  grad_std = d * (2.0f + d) * reciprocal(std);
}

// How an update's statistics are kept: not at all, for one sample; the first gradient of an antithetic pair, in m1; or the
// sums of g and g * eps, in m1 and m2.
enum class Statistics { kNone, kPair, kSums };

struct Accumulation {
  float grad_scale;
  bool first;  // of an update: its statistics overwrite the last one's
};

struct Update {
  float lr, kl_weight;
  float grad_scale;       // multiplies the gradient: the inverse of GradScaler's scale
  float statistic_scale;  // multiplies both statistics: loss_scale / samples, and (1 - kl_weight) with a prior
  float max_mean_step, max_a, max_std;
  bool learn_mean, learn_std;
};

// The BGD update of one element from its statistics s1 = sum(g) and s2 = sum(g * eps). `finite` is false where mean and
// std were kept because the update was not finite.
template <bool with_prior, class F, class M>
DISTRUCTION_FN void update(const Update& u, F s1, F s2, F prior_mean, F prior_std, F& mean, F& std, M& finite) {
  F a = 0.5f * u.statistic_scale * s2 * std;
  F ratio = std;
  if (with_prior) {
    const F inverse_prior = reciprocal(prior_std);
    ratio = std * inverse_prior;
    const F d = (std - prior_std) * inverse_prior;
    a = a + 0.5f * u.kl_weight * (d * (2.0f + d));
  }
  F step = u.lr * u.statistic_scale * s1 * std;  // in units of std
  step = at_least(at_most(step, splat<F>(u.max_mean_step)), splat<F>(-u.max_mean_step));
  F new_mean = mean - std * step;
  if (with_prior) {
    const F v = u.lr * u.kl_weight * ratio * ratio;
    // From the nearer end: the other one's digits would cancel.
    const F distance = prior_mean - new_mean, share = reciprocal(1.0f + v);
    new_mean = v < 1.0f ? new_mean + v * share * distance : prior_mean - share * distance;
  }
  a = at_least(at_most(a, splat<F>(u.max_a)), splat<F>(-u.max_a));
  F new_std;
  if (kShortcuts<F> && u.max_a <= 0.125f) {
    // The root's series; its next term is below 3e-9.
    const F a2 = a * a;
    new_std = std + std * (a2 * ((0.0625f * a2 - 0.125f) * a2 + 0.5f) - a);
  } else {
    // The larger root never cancels, so std stays positive for every a.
    const F root = square_root(1.0f + a * a), w = root + absolute(a);
    new_std = std * (a > 0.0f ? reciprocal(w) : w);
  }
  new_std = at_most(new_std, splat<F>(u.max_std));
  // x - x is zero unless x is infinite or NaN; additions leave the busier multipliers alone.
  finite = ((s1 - s1) + (s2 - s2) + (new_mean - new_mean) + (new_std - new_std) == 0.0f) & (new_std > 0.0f);
  if (u.learn_mean) mean = finite ? new_mean : mean;
  if (u.learn_std) std = finite ? new_std : std;
}

// The Gauss-Newton update of one element; `grad_scale` is sqrt(evidence) / GradScaler's scale. `finite` is false where
// std was kept because the gradient in units of 1 / std was not finite.
template <class F, class M>
DISTRUCTION_FN void gauss_newton(F grad, float grad_scale, F& std, M& finite) {
  constexpr float kLargest = 0x1p126f;  // whose reciprocal is the smallest normal number
  const F t = absolute(grad * std * grad_scale);
  // Beyond 2**63, where the square overflows, the hypotenuse is t.
  const F hypotenuse = at_least(square_root(at_most(1.0f + t * t, splat<F>(kLargest))), t);
  const F shrunk = at_least(std * reciprocal(hypotenuse), splat<F>(1.0f / kLargest));
  finite = t <= kLargest;
  std = finite ? at_most(shrunk, std) : std;
}

}  // namespace distruction
