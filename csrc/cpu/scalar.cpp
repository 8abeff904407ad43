// One element at a time, by the functions that the threads of the CUDA kernels run: the check of their arithmetic.
#include "../block.h"
#include "kernels.h"

namespace distruction {
namespace {

// Calls f(entry, group) over a range.
template <class F>
void for_each_group(const Model& m, Range r, F f) {
  const Entry t = entry_of(m, r.tensor);
  for (int64_t block = r.begin / 4; 4 * block < r.end; ++block)
    distruction::for_each_group(t, block, [&](auto group) { f(t, group); });
}

void words(uint64_t block, int64_t blocks, uint32_t number, uint32_t stream, uint64_t seed, uint32_t* out) {
  for (int64_t i = 0; i < blocks; ++i) {
    uint32_t w[4];
    block_words({seed, number, 0u}, stream, static_cast<int64_t>(block + static_cast<uint64_t>(i)), w);
    memcpy(out + 4 * i, w, sizeof w);
  }
}

void sample(const Model& m, Range r, Draw draw) {
  for_each_group(m, r, [&](const Entry& t, auto group) { sample_group(t, group, draw, m.stochastic_rounding); });
}

void accumulate(const Model& m, Range r, Draw draw, Draw next, const Accumulation& a) {
  for_each_group(m, r, [&](const Entry& t, auto group) {
    m.m2 ? accumulate_group<false>(t, group, draw, next, m.stochastic_rounding, a)
         : accumulate_group<true>(t, group, draw, next, m.stochastic_rounding, a);
  });
}

template <Prior prior, Statistics statistics>
double step_range(const Model& m, Range r, Draw draw, Draw next, const Update& u, bool& finite) {
  double kl = 0;
  for_each_group(m, r, [&](const Entry& t, auto group) {
    step_group<prior, statistics>(t, group, draw, next, m.stochastic_rounding, u, kl, finite);
  });
  return kl;
}

double step(const Model& m, Range r, Draw draw, Draw next, const Update& u, bool& finite) {
  return for_variant(m, [&](auto prior, auto statistics) {
    return step_range<prior.value, statistics.value>(m, r, draw, next, u, finite);
  });
}

void gauss_newton(const Model& m, Range r, Draw next, float grad_scale, bool& finite) {
  for_each_group(m, r, [&](const Entry& t, auto group) {
    gauss_newton_group(t, group, next, m.stochastic_rounding, grad_scale, finite);
  });
}

double gaussian_kl(const Model& m, Range r) {
  double kl = 0;
  for_each_group(m, r, [&](const Entry& t, auto group) {
    if (m.prior_codes)
      kl_group<false, Prior::kCodes>(t, group, kl);
    else if (m.grad_mean)
      kl_group<true, Prior::kFloats>(t, group, kl);
    else
      kl_group<false, Prior::kFloats>(t, group, kl);
  });
  return kl;
}

}  // namespace

extern const Kernels kScalar = {"scalar", words, sample, accumulate, step, gauss_newton, gaussian_kl};

}  // namespace distruction
