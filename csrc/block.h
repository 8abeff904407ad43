// The ops on one block of the generator: its four elements at once where a tensor allows it, else one by one. A thread
// of the CUDA kernels and the `scalar` instruction set of the CPU run the same functions.
#pragma once

#include "codes.h"
#include "conversions.h"
#include "kl.h"
#include "model.h"

namespace distruction {

// One tensor of a model; pointers that an op does not use are null.
struct Entry {
  void* param;
  const void* grad;
  float* mean;
  float* std;
  float* m1;  // gaussian_kl: dKL/dmean
  float* m2;  // gaussian_kl: dKL/dstd
  const void* prior_mean;
  const void* prior_std;  // or its codes
  const float* prior_low;
  const float* prior_step;
  int64_t numel, offset;
  uint32_t stream;
  int32_t first_chunk;
  uint8_t param_type, grad_type, prior_mean_type;
  bool aligned;  // pointers and offset allow accesses of four elements at once
};

static inline Entry entry_of(const Model& m, int64_t i) {
  Entry t = {};
  t.mean = m.mean[i];
  t.std = m.std[i];
  t.numel = m.numel[i];
  t.offset = m.offset[i];
  t.stream = static_cast<uint32_t>(m.stream[i]);
  if (m.param) t.param = m.param[i], t.param_type = static_cast<uint8_t>(m.param_type[i]);
  if (m.grad) t.grad = m.grad[i], t.grad_type = static_cast<uint8_t>(m.grad_type[i]);
  if (m.m1) t.m1 = m.m1[i];
  if (m.m2) t.m2 = m.m2[i];
  if (m.grad_mean) t.m1 = m.grad_mean[i], t.m2 = m.grad_std[i];
  if (m.prior_mean) t.prior_mean = m.prior_mean[i], t.prior_mean_type = static_cast<uint8_t>(m.prior_mean_type[i]);
  if (m.prior_std) t.prior_std = m.prior_std[i];
  if (m.prior_codes) t.prior_std = m.prior_codes[i], t.prior_low = m.prior_low[i], t.prior_step = m.prior_step[i];
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const uintptr_t any = address(t.param) | address(t.grad) | address(t.mean) | address(t.std) | address(t.m1) |
                        address(t.m2) | address(t.prior_mean) | address(t.prior_std);
  t.aligned = any % 16 == 0 && t.offset % 4 == 0;
  return t;
}

// n consecutive elements of a tensor, n = 4 or 1: elements lane .. lane + n of a block.
template <int n>
struct Group {
  int64_t index, block;
  int lane;
};

// Calls f(group) for the elements of the block that lie inside the tensor.
template <class F>
DISTRUCTION_FN void for_each_group(const Entry& t, int64_t block, F f) {
  const int64_t index = 4 * block - t.offset;
  if (t.aligned && index + 4 <= t.numel) return f(Group<4>{index, block, 0});
  for (int lane = 0; lane < 4; ++lane)
    if (index + lane >= 0 && index + lane < t.numel) f(Group<1>{index + lane, block, lane});
}

template <class T, int n>
struct alignas(n * sizeof(T)) Packed {
  T v[n];
};

template <class T, int n>
DISTRUCTION_FN void load(const T* p, const Group<n>& g, T (&x)[n]) {
  const Packed<T, n> packed = *reinterpret_cast<const Packed<T, n>*>(p + g.index);
  for (int j = 0; j < n; ++j) x[j] = packed.v[j];
}

template <class T, int n>
DISTRUCTION_FN void store(T* p, const Group<n>& g, const T (&x)[n]) {
  Packed<T, n> packed;
  for (int j = 0; j < n; ++j) packed.v[j] = x[j];
  *reinterpret_cast<Packed<T, n>*>(p + g.index) = packed;
}

template <int n>
DISTRUCTION_FN void load_as_float(const void* p, uint8_t type, const Group<n>& g, float (&x)[n]) {
  if (type == kFloat32) {
    load(static_cast<const float*>(p), g, x);
  } else {
    uint16_t bits[n];
    load(static_cast<const uint16_t*>(p), g, bits);
    for (int j = 0; j < n; ++j) x[j] = type == kBFloat16 ? bfloat16_to_float(bits[j]) : float16_to_float(bits[j]);
  }
}

template <Prior prior, int n>
DISTRUCTION_FN void load_prior(const Entry& t, const Group<n>& g, float (&mean)[n], float (&std)[n]) {
  if (prior == Prior::kFloats) {
    load(static_cast<const float*>(t.prior_mean), g, mean);
    load(static_cast<const float*>(t.prior_std), g, std);
  } else if (prior == Prior::kCodes) {
    uint8_t codes[n];
    load(static_cast<const uint8_t*>(t.prior_std), g, codes);
    load_as_float(t.prior_mean, t.prior_mean_type, g, mean);
    const int64_t block = 4 * g.block / kCodesPerBlock;
    const float low = t.prior_low[block], rate = rate_of(t.prior_step[block]);
    for (int j = 0; j < n; ++j) std[j] = decode(static_cast<float>(codes[j]), low, rate);
  }
}

template <int n>
DISTRUCTION_FN void store_param(
    const Entry& t, const Group<n>& g, const float (&x)[n], const uint32_t (&words)[n], bool stochastic_rounding) {
  if (t.param_type == kFloat32) return store(static_cast<float*>(t.param), g, x);
  uint16_t bits[n];
  for (int j = 0; j < n; ++j) {
    if (t.param_type == kFloat16)
      bits[j] = float_to_float16(x[j]);
    else
      bits[j] = stochastic_rounding ? float_to_bfloat16_stochastic(x[j], words[j]) : float_to_bfloat16(x[j]);
  }
  store(static_cast<uint16_t*>(t.param), g, bits);
}

DISTRUCTION_FN void block_words(const Draw& draw, uint32_t stream, int64_t block, uint32_t (&words)[4]) {
  uint32_t c[1][4] = {
      {static_cast<uint32_t>(block), static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32), draw.number, stream}};
  philox<0>(c, draw.seed);
  for (int j = 0; j < 4; ++j) words[j] = c[0][j];
}

DISTRUCTION_FN void words_and_normals(
    const Draw& draw, uint32_t stream, const Group<4>& g, uint32_t (&words)[4], float (&eps)[4]) {
  block_words(draw, stream, g.block, words);
  box_muller(words[0], words[1], draw.sign, eps[0], eps[1]);
  box_muller(words[2], words[3], draw.sign, eps[2], eps[3]);
}

DISTRUCTION_FN void words_and_normals(
    const Draw& draw, uint32_t stream, const Group<1>& g, uint32_t (&words)[1], float (&eps)[1]) {
  uint32_t w[4];
  block_words(draw, stream, g.block, w);
  const uint32_t radius_word = g.lane < 2 ? w[0] : w[2], angle_word = g.lane < 2 ? w[1] : w[3];
  float cosine, sine;
  box_muller(radius_word, angle_word, draw.sign, cosine, sine);
  words[0] = g.lane % 2 ? angle_word : radius_word;
  eps[0] = g.lane % 2 ? sine : cosine;
}

// Writes mean + std * eps into the parameter.
template <int n>
DISTRUCTION_FN void write_sample(
    const Entry& t, const Group<n>& g, const Draw& draw, bool stochastic_rounding, const float (&mean)[n],
    const float (&std)[n]) {
  uint32_t words[n];
  float eps[n], theta[n];
  words_and_normals(draw, t.stream, g, words, eps);
  for (int j = 0; j < n; ++j) theta[j] = mean[j] + std[j] * eps[j];
  store_param(t, g, theta, words, stochastic_rounding);
}

template <int n>
DISTRUCTION_FN void sample_group(const Entry& t, const Group<n>& g, const Draw& draw, bool stochastic_rounding) {
  float mean[n], std[n];
  load(t.mean, g, mean);
  load(t.std, g, std);
  write_sample(t, g, draw, stochastic_rounding, mean, std);
}

// Adds x to what an array holds or, in the first accumulation, writes it there.
template <int n>
DISTRUCTION_FN void add(float* p, const Group<n>& g, bool first, float (&x)[n]) {
  if (!first) {
    float sum[n];
    load(p, g, sum);
    for (int j = 0; j < n; ++j) x[j] += sum[j];
  }
  store(p, g, x);
}

template <bool pair, int n>
DISTRUCTION_FN void accumulate_group(
    const Entry& t, const Group<n>& g, const Draw& draw, const Draw& next, bool stochastic_rounding,
    const Accumulation& a) {
  float grad[n];
  load_as_float(t.grad, t.grad_type, g, grad);
  for (int j = 0; j < n; ++j) grad[j] *= a.grad_scale;
  if (pair) {
    store(t.m1, g, grad);
  } else {
    uint32_t words[n];
    float eps[n];
    words_and_normals(draw, t.stream, g, words, eps);
    for (int j = 0; j < n; ++j) eps[j] *= grad[j];
    add(t.m2, g, a.first, eps);
    add(t.m1, g, a.first, grad);
  }
  sample_group(t, g, next, stochastic_rounding);
}

// Adds the KL of the updated posterior to `kl` and clears `finite` where an element was kept as it was.
template <Prior prior, Statistics statistics, int n>
DISTRUCTION_FN void step_group(
    const Entry& t, const Group<n>& g, const Draw& draw, const Draw& next, bool stochastic_rounding, const Update& u,
    double& kl, bool& finite) {
  constexpr bool with_prior = prior != Prior::kNone;
  uint32_t words[n];
  float mean[n], std[n], prior_mean[n] = {}, prior_std[n] = {}, s1[n], s2[n], m1[n] = {}, m2[n] = {};
  load(t.mean, g, mean);
  load(t.std, g, std);
  load_prior<prior>(t, g, prior_mean, prior_std);
  load_as_float(t.grad, t.grad_type, g, s1);
  words_and_normals(draw, t.stream, g, words, s2);
  if (statistics != Statistics::kNone) load(t.m1, g, m1);
  if (statistics == Statistics::kSums) load(t.m2, g, m2);
  for (int j = 0; j < n; ++j) add_up<statistics>(u, m1[j], m2[j], s1[j], s2[j]);
  for (int j = 0; j < n; ++j) {
    bool is_finite;
    update<with_prior>(u, s1[j], s2[j], prior_mean[j], prior_std[j], mean[j], std[j], is_finite);
    finite = finite && is_finite;
    if (with_prior) {
      float value, grad_mean, grad_std;
      kl_with_gradients(mean[j], std[j], prior_mean[j], prior_std[j], value, grad_mean, grad_std);
      kl += static_cast<double>(value);
    }
  }
  if (u.learn_mean) store(t.mean, g, mean);
  if (u.learn_std) store(t.std, g, std);
  write_sample(t, g, next, stochastic_rounding, mean, std);
}

template <int n>
DISTRUCTION_FN void gauss_newton_group(
    const Entry& t, const Group<n>& g, const Draw& next, bool stochastic_rounding, float grad_scale, bool& finite) {
  float mean[n], std[n], grad[n];
  load(t.mean, g, mean);
  load(t.std, g, std);
  load_as_float(t.grad, t.grad_type, g, grad);
  for (int j = 0; j < n; ++j) {
    bool is_finite;
    gauss_newton(grad[j], grad_scale, std[j], is_finite);
    finite = finite && is_finite;
  }
  store(t.std, g, std);
  write_sample(t, g, next, stochastic_rounding, mean, std);
}

template <bool with_gradients, Prior prior, int n>
DISTRUCTION_FN void kl_group(const Entry& t, const Group<n>& g, double& kl) {
  float mean[n], std[n], prior_mean[n], prior_std[n], grad_mean[n], grad_std[n];
  load(t.mean, g, mean);
  load(t.std, g, std);
  load_prior<prior>(t, g, prior_mean, prior_std);
  for (int j = 0; j < n; ++j) {
    float value;
    kl_with_gradients(mean[j], std[j], prior_mean[j], prior_std[j], value, grad_mean[j], grad_std[j]);
    kl += static_cast<double>(value);
  }
  if (with_gradients) {
    store(t.m1, g, grad_mean);
    store(t.m2, g, grad_std);
  }
}

}  // namespace distruction
