// The CPU kernels' C interface: the choice of the instruction set, and the division of a model into chunks of equal
// size that threads share. The KL's partial sums belong to the chunks, so that no result depends on the threads.
#include <atomic>
#include <thread>
#include <vector>

#include "kernels.h"

namespace distruction {
namespace {

constexpr int64_t kChunk = 16 * kPiece;

#if defined(__x86_64__)
const Kernels* const kSets[] = {&kAvx512, &kAvx2, &kBaseline, &kScalar};
#else
const Kernels* const kSets[] = {&kBaseline, &kScalar};
#endif
constexpr int kSetCount = sizeof kSets / sizeof *kSets;

bool supported(const Kernels* set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (set == &kAvx2) return avx2;
  if (set == &kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return set != nullptr;
}

// torch_parallel_for of PyTorch's stable C interface, 2.10 or later.
using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

struct Chunks {
  const Model& model;
  std::vector<int64_t> first;  // first chunk of each tensor, and the total

  explicit Chunks(const Model& m) : model(m), first(static_cast<size_t>(m.tensors) + 1) {
    for (int64_t i = 0; i < m.tensors; ++i) {
      const int64_t begin = m.offset[i] / kChunk, end = (m.offset[i] + m.numel[i] + kChunk - 1) / kChunk;
      first[static_cast<size_t>(i) + 1] = first[static_cast<size_t>(i)] + (m.numel[i] ? end - begin : 0);
    }
  }
};

template <class Body>
struct Work {
  const Chunks& chunks;
  const Body& body;

  static void run(int64_t begin, int64_t end, void* context) {
    const Work& work = *static_cast<const Work*>(context);
    const Model& m = work.chunks.model;
    const std::vector<int64_t>& first = work.chunks.first;
    int64_t low = 0, high = m.tensors;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[static_cast<size_t>(middle)] <= begin ? low : high) = middle;
    }
    for (int64_t tensor = low, chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first[static_cast<size_t>(tensor) + 1]) ++tensor;
      const int64_t start = m.offset[tensor], stop = start + m.numel[tensor];
      const int64_t at = (start / kChunk + chunk - first[static_cast<size_t>(tensor)]) * kChunk;
      work.body(chunk, Range{tensor, at > start ? at : start, at + kChunk < stop ? at + kChunk : stop});
    }
  }
};

// Calls body(chunk, range) for every chunk, in PyTorch's thread pool or, without its interface, in threads of our own.
template <class Body>
void for_each_chunk(const Chunks& chunks, ParallelFor parallel_for, int64_t threads, const Body& body) {
  Work<Body> work{chunks, body};
  const int64_t total = chunks.first.back();
  if (threads > total) threads = total;
  if (threads <= 1) {
    if (total) Work<Body>::run(0, total, &work);
  } else if (parallel_for) {
    parallel_for(0, total, 1, &Work<Body>::run, &work);
  } else {
    std::vector<std::thread> pool;
    const auto bound = [=](int64_t i) { return total * i / threads; };
    for (int64_t i = 1; i < threads; ++i) pool.emplace_back(&Work<Body>::run, bound(i), bound(i + 1), &work);
    Work<Body>::run(0, bound(1), &work);
    for (std::thread& thread : pool) thread.join();
  }
}

double sum(const std::vector<double>& parts) {
  double total = 0;
  for (const double part : parts) total += part;
  return total;
}

const Kernels& kernels(int32_t set) { return *kSets[set]; }

}  // namespace
}  // namespace distruction

using namespace distruction;

#define DISTRUCTION_API extern "C" __attribute__((visibility("default")))

// Changes with every change of the interface, so that a stale library is noticed.
DISTRUCTION_API int32_t distruction_abi() { return 5; }

// The name of instruction set `set`, best first, or null past the last; `usable` says whether this CPU has it.
DISTRUCTION_API const char* distruction_cpu_set(int32_t set, int32_t* usable) {
  if (set < 0 || set >= kSetCount) return nullptr;
  *usable = supported(kSets[set]);
  return kSets[set]->name;
}

DISTRUCTION_API void distruction_cpu_words(
    int32_t set, int64_t block, int64_t blocks, int64_t number, int64_t stream, int64_t seed, uint32_t* out) {
  kernels(set).words(static_cast<uint64_t>(block), blocks, static_cast<uint32_t>(number),
                     static_cast<uint32_t>(stream), static_cast<uint64_t>(seed), out);
}

DISTRUCTION_API void distruction_cpu_sample(int32_t set, ParallelFor parallel_for, int64_t threads, const Model* m) {
  const Draw draw = draw_of(static_cast<uint64_t>(m->seed), m->counters[0], m->antithetic);
  for_each_chunk(Chunks(*m), parallel_for, threads,
                 [&](int64_t, Range r) { kernels(set).sample(*m, r, draw); });
}

DISTRUCTION_API void distruction_cpu_accumulate(
    int32_t set, ParallelFor parallel_for, int64_t threads, const Model* m, const Options* o) {
  const Draw draw = draw_of(static_cast<uint64_t>(m->seed), m->counters[0], m->antithetic);
  const Draw next = draw_of(static_cast<uint64_t>(m->seed), m->counters[0] + 1, m->antithetic);
  const Accumulation a{inverse(o->grad_scale), m->counters[1] == 0};
  for_each_chunk(Chunks(*m), parallel_for, threads,
                 [&](int64_t, Range r) { kernels(set).accumulate(*m, r, draw, next, a); });
  m->counters[0] += 1;
  m->counters[1] += 1;
}

DISTRUCTION_API double distruction_cpu_step(
    int32_t set, ParallelFor parallel_for, int64_t threads, const Model* m, const Options* o) {
  const Draw draw = draw_of(static_cast<uint64_t>(m->seed), m->counters[0], m->antithetic);
  const Draw next = draw_of(static_cast<uint64_t>(m->seed), m->counters[0] + 1, m->antithetic);
  const Update u =
      update_of(*o, o->lr, o->kl_weight, o->grad_scale, m->m1 ? m->counters[1] + 1 : 1, m->prior_mean != nullptr);
  const Chunks chunks(*m);
  std::vector<double> kl(static_cast<size_t>(chunks.first.back()));
  std::atomic<bool> all_finite{true};
  for_each_chunk(chunks, parallel_for, threads, [&](int64_t chunk, Range r) {
    bool finite = true;
    kl[static_cast<size_t>(chunk)] = kernels(set).step(*m, r, draw, next, u, finite);
    if (!finite) all_finite.store(false, std::memory_order_relaxed);
  });
  m->counters[0] += 1;
  m->counters[1] = 0;
  if (!all_finite) m->counters[2] = 1;
  return sum(kl);
}

DISTRUCTION_API void distruction_cpu_gauss_newton(
    int32_t set, ParallelFor parallel_for, int64_t threads, const Model* m, const Options* o) {
  const Draw next = draw_of(static_cast<uint64_t>(m->seed), m->counters[0] + 1, m->antithetic);
  const float grad_scale = o->root_evidence * inverse(o->grad_scale);
  std::atomic<bool> all_finite{true};
  for_each_chunk(Chunks(*m), parallel_for, threads, [&](int64_t, Range r) {
    bool finite = true;
    kernels(set).gauss_newton(*m, r, next, grad_scale, finite);
    if (!finite) all_finite.store(false, std::memory_order_relaxed);
  });
  m->counters[0] += 1;
  m->counters[1] = 0;
  if (!all_finite) m->counters[2] = 1;
}

DISTRUCTION_API double distruction_cpu_gaussian_kl(
    int32_t set, ParallelFor parallel_for, int64_t threads, const Model* m) {
  const Chunks chunks(*m);
  std::vector<double> kl(static_cast<size_t>(chunks.first.back()));
  for_each_chunk(chunks, parallel_for, threads, [&](int64_t chunk, Range r) {
    kl[static_cast<size_t>(chunk)] = kernels(set).gaussian_kl(*m, r);
  });
  return sum(kl);
}
