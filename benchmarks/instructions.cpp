// One call of a CPU kernel on one tensor, for `benchmarks.instructions`, which counts its instructions:
//   instructions LIBRARY OP SET ELEMENTS DRAW ARRAYS      ARRAYS: letters of p (prior), c (its codes), 1 and 2 (statistics)
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "model.h"

using namespace distruction;

namespace {

uint32_t state = 1;

float uniform(float low, float high) {
  state = state * 1664525u + 1013904223u;
  return low + (high - low) * static_cast<float>(state >> 8) * 0x1p-24f;
}

struct Array {
  std::vector<float> values;
  float* pointer;
  Array(int64_t n, float low, float high) : values(static_cast<size_t>(n) + 16) {
    for (float& v : values) v = uniform(low, high);
    pointer = values.data();
    while (reinterpret_cast<uintptr_t>(pointer) % 64) ++pointer;
  }
};

// A prior's arrays, for the structure as it is and as older versions have it.
template <class M>
auto set_prior(M& m, const void* const* mean, const int64_t* type, const float* const* std, int)
    -> decltype(m.prior_mean_type, void()) {
  m.prior_mean = mean, m.prior_mean_type = type, m.prior_std = std;
}
template <class M>
void set_prior(M& m, const void* const* mean, const int64_t*, const float* const* std, long) {
  m.prior_mean = reinterpret_cast<const float* const*>(mean), m.prior_std = std;
}
template <class M>
auto set_codes(M& m, const uint8_t* const* codes, const float* const* low, const float* const* step, int)
    -> decltype(m.prior_codes, void()) {
  m.prior_codes = codes, m.prior_low = low, m.prior_step = step, m.prior_std = nullptr;
}
template <class M>
void set_codes(M&, const uint8_t* const*, const float* const*, const float* const*, long) {}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 3;
  char symbol[64];
  snprintf(symbol, sizeof symbol, "distruction_cpu_%s", argv[2]);
  void* function = dlsym(library, symbol);
  const auto name_of = reinterpret_cast<const char* (*)(int32_t, int32_t*)>(dlsym(library, "distruction_cpu_set"));
  int32_t set = 0, usable = 0;
  const char* name;
  while ((name = name_of(set, &usable)) && strcmp(name, argv[3])) ++set;
  if (!function || !name) return 4;
  const int64_t n = atoll(argv[4]), zero = 0;
  // A posterior near its prior, as forgetting has it.
  Array param(n, -1, 1), grad(n, -1e-3f, 1e-3f), mean(n, -1, 1), prior_mean(n, -1, 1), prior_std(n, 0.02f, 0.05f);
  Array std(n, 0.9f, 1.1f), m1(n, -1e-3f, 1e-3f), m2(n, -1e-3f, 1e-3f), grad_mean(n, 0, 0), grad_std(n, 0, 0);
  for (int64_t i = 0; i < n; ++i) std.pointer[i] *= prior_std.pointer[i];
  void* const param_list = param.pointer;
  const void* const grad_list = grad.pointer;
  const void* const prior_mean_list = prior_mean.pointer;
  const float* const prior_std_list = prior_std.pointer;
  int64_t counters[3] = {atoll(argv[5]), 0, 0};
  Model m = {};
  m.tensors = 1;
  m.numel = &n;
  m.offset = m.stream = m.param_type = m.grad_type = &zero;
  m.mean = &mean.pointer;
  m.std = &std.pointer;
  m.param = &param_list;
  m.grad = &grad_list;
  std::vector<uint8_t> codes(static_cast<size_t>(n) + 64);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(uniform(0, 256));
  // Of all blocks: from 0.02 to 0.05.
  const Array low(n, 0.02f, 0.02f), step(n, 0.0036f, 0.0036f);
  const uint8_t* const codes_list = codes.data();
  const float *const low_list = low.pointer, *const step_list = step.pointer;
  const bool coded = strchr(argv[6], 'c');
  if (coded || strchr(argv[6], 'p')) set_prior(m, &prior_mean_list, &zero, &prior_std_list, 0);
  if (coded) set_codes(m, &codes_list, &low_list, &step_list, 0);
  if (strchr(argv[6], '1')) m.m1 = &m1.pointer, counters[1] = counters[0] & 1;
  if (strchr(argv[6], '2')) m.m2 = &m2.pointer;
  if (!strcmp(argv[2], "gaussian_kl")) m.grad_mean = &grad_mean.pointer, m.grad_std = &grad_std.pointer;
  m.counters = counters;
  m.antithetic = 1;
  Options o = {};
  o.lr = o.grad_scale = 1.0f;
  o.kl_weight = 0.1f;
  o.loss_scale = 1000.0f;
  o.max_mean_step = o.max_a = o.max_std = 0.1f;
  o.learn_mean = o.learn_std = 1;
  using Op = void (*)(int32_t, void*, int64_t, const Model*, const Options*);
  reinterpret_cast<Op>(function)(set, nullptr, 1, &m, &o);
  return 0;
}
