// The KL divergence; formulas are in distruction/ops/reference/kl.py, which these functions follow line by line.
#pragma once

#include "maths.h"

namespace distruction {

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

}  // namespace distruction
