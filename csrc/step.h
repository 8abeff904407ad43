// The updates of a posterior; formulas and sources are in distruction/ops/reference/{step,gauss_newton}.py, which these
// functions follow line by line. One function serves a float, a vector of the CPU's, and a thread of a GPU.
#pragma once

#include "maths.h"

namespace distruction {

// How an update's statistics are kept: not at all, for one sample; the first gradient of an antithetic pair, in m1; or
// the sums of g and g * eps, in m1 and m2.
enum class Statistics { kNone, kPair, kSums };

// How a prior is kept: not at all, as means and stds, or as means, maybe of 16 bits, and codes of the stds.
enum class Prior { kNone, kFloats, kCodes };

struct Accumulation {
  float grad_scale;
  bool first;  // of an update: its statistics overwrite the last one's
};

struct Update {
  float lr, kl_weight;
  float grad_scale;       // multiplies the gradient: the inverse of GradScaler's scale
  float statistic_scale;  // multiplies both statistics: loss_scale / samples, and (1 - kl_weight) with a prior
  float max_mean_step, max_a, max_std;
  bool small_a;  // max_a is so small that a series serves
  bool learn_mean, learn_std;
};

// Turns the gradient and the normal of an update's last sample, in s1 and s2, into the sums of g and of g * eps over all
// of its samples, of which the earlier ones left m1 and m2.
template <Statistics statistics, class F>
DISTRUCTION_FN void add_up(const Update& u, F m1, F m2, F& s1, F& s2) {
  s1 *= u.grad_scale;
  if (statistics != Statistics::kPair) s2 *= s1;
  if (statistics != Statistics::kNone) {
    if (statistics == Statistics::kPair) s2 *= s1 - m1;
    s1 += m1;
  }
  if (statistics == Statistics::kSums) s2 += m2;
}

// The BGD update of one element from those sums. `finite` is false where mean and std were kept because the update was
// not finite.
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
  F in_stds = u.lr * u.statistic_scale * s1 * std;
  in_stds = at_least(at_most(in_stds, splat<F>(u.max_mean_step)), splat<F>(-u.max_mean_step));
  F new_mean = mean - std * in_stds;
  if (with_prior) {
    const F v = u.lr * u.kl_weight * ratio * ratio;
    // From the nearer end: the other one's digits would cancel.
    const F distance = prior_mean - new_mean, share = reciprocal(1.0f + v);
    new_mean = v < 1.0f ? new_mean + v * share * distance : prior_mean - share * distance;
  }
  a = at_least(at_most(a, splat<F>(u.max_a)), splat<F>(-u.max_a));
  F new_std;
  if (kShortcuts<F> && u.small_a) {
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
  finite = new_std > (s1 - s1) + (s2 - s2) + (new_mean - new_mean) + (new_std - new_std);
  if (kShortcuts<F> && all(finite)) {
    if (u.learn_mean) mean = new_mean;
    if (u.learn_std) std = new_std;
  } else {
    if (u.learn_mean) mean = finite ? new_mean : mean;
    if (u.learn_std) std = finite ? new_std : std;
  }
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
