// The binary interface between Python and the kernels: plain C, so that one build serves every version of Python and
// PyTorch. distruction/ops/native.py mirrors these structures and checks what they hold.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "generator.h"
#include "step.h"

namespace distruction {

enum Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A whole model: arrays with one entry per tensor. Arrays that an op does not use are null.
struct Model {
  int64_t tensors;
  const int64_t* numel;
  const int64_t* offset;  // flat index, in the whole parameter, of the first element
  const int64_t* stream;
  void* const* param;
  const int64_t* param_type;
  const void* const* grad;
  const int64_t* grad_type;
  float* const* mean;
  float* const* std;
  float* const* m1;
  float* const* m2;
  const void* const* prior_mean;
  const int64_t* prior_mean_type;
  const float* const* prior_std;
  const uint8_t* const* prior_codes;  // in place of prior_std
  const float* const* prior_low;      // of each block of codes of the whole parameter
  const float* const* prior_step;
  float* const* grad_mean;  // outputs of gaussian_kl
  float* const* grad_std;
  int64_t* counters;  // draw number, samples accumulated, an update was refused
  int64_t seed;
  int32_t antithetic;
  int32_t stochastic_rounding;
};

// The scalars of an update as Python passes them; those that live on a GPU are read there, through the pointers.
struct Options {
  float lr, kl_weight, loss_scale, grad_scale;
  const float* lr_pointer;
  const float* kl_weight_pointer;
  const float* grad_scale_pointer;
  const float* found_inf_pointer;
  float max_mean_step, max_a, max_std, root_evidence;
  int32_t learn_mean, learn_std;
};

// Calls f(prior, statistics) with what a step has to do, in types whose `value` is a constant.
template <class F>
auto for_variant(const Model& m, F f) {
  const auto with = [&](auto prior) {
    using S = Statistics;
    if (!m.m1) return f(prior, std::integral_constant<S, S::kNone>{});
    return m.m2 ? f(prior, std::integral_constant<S, S::kSums>{}) : f(prior, std::integral_constant<S, S::kPair>{});
  };
  if (m.prior_codes) return with(std::integral_constant<Prior, Prior::kCodes>{});
  return m.prior_std ? with(std::integral_constant<Prior, Prior::kFloats>{})
                     : with(std::integral_constant<Prior, Prior::kNone>{});
}

// `samples` counts the gradient at hand and those in m1 and m2.
DISTRUCTION_FN Update update_of(
    const Options& o, float lr, float kl_weight, float grad_scale, int64_t samples, bool with_prior) {
  Update u;
  u.lr = lr;
  u.kl_weight = with_prior ? kl_weight : 0.0f;
  u.grad_scale = inverse(grad_scale);
  u.statistic_scale = o.loss_scale * (1.0f - u.kl_weight) / static_cast<float>(samples);
  u.max_mean_step = o.max_mean_step;
  u.max_a = o.max_a;
  u.max_std = o.max_std;
  u.small_a = o.max_a <= 0.125f;
  u.learn_mean = o.learn_mean != 0;
  u.learn_std = o.learn_std != 0;
  return u;
}

}  // namespace distruction
