// The CUDA kernels and their C interface: a whole model per launch, four elements per access, no copy and no
// synchronisation between host and device. Everything that changes from step to step is read on the device, so
// that launches can be captured in a CUDA graph. No header of PyTorch is needed.
#include <cuda_runtime.h>

#include "../block.h"

namespace distruction {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerThread = 4;  // generator blocks, one after the other
constexpr int kBlocksPerChunk = kThreads * kBlocksPerThread;

// The tensors of one launch, by value: a kernel's arguments may take 32 KiB since CUDA 12.1, 4 KiB before.
#if CUDART_VERSION >= 12010
constexpr int kCapacity = 288;
#else
constexpr int kCapacity = 34;
#endif

static_assert(sizeof(Entry) == 112, "a tensor's entry is packed");

struct Table {
  Entry entry[kCapacity];
  int32_t tensors, chunks;
};

struct Control {
  Options options;
  int64_t* counters;
  uint64_t seed;
  bool antithetic, stochastic_rounding;
  double* partial;  // one sum of KL per chunk of the launch
};

__host__ __device__ inline int64_t block_count(const Entry& t) {
  return (t.offset + t.numel + 3) / 4 - t.offset / 4;
}

// The tensor that chunk `chunk` of the launch belongs to.
__device__ inline const Entry& entry_of_chunk(const Table& table, int32_t chunk) {
  int low = 0, high = table.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entry[middle].first_chunk <= chunk)
      low = middle;
    else
      high = middle;
  }
  return table.entry[low];
}

// Calls f(group) for the elements of this thread.
template <class F>
__device__ __forceinline__ void for_each_group_of_thread(const Entry& t, F f) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) - t.first_chunk;
  const int64_t first = t.offset / 4, end = first + block_count(t);
#pragma unroll 1
  for (int k = 0; k < kBlocksPerThread; ++k) {
    const int64_t block = first + chunk * kBlocksPerChunk + k * kThreads + threadIdx.x;
    if (block < end) for_each_group(t, block, f);
  }
}

__device__ inline bool skipped(const Options& o) { return o.found_inf_pointer && *o.found_inf_pointer != 0.0f; }

__device__ inline float value_of(const float* pointer, float value) { return pointer ? *pointer : value; }

// The sum over the thread block, in thread 0; every thread must call it.
__device__ inline double block_sum(double x) {
  __shared__ double of_warp[kThreads / 32];
  for (int lane = 16; lane; lane /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, lane);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) x += of_warp[warp];
  return x;
}

__global__ void __launch_bounds__(kThreads, 4)
    sample_kernel(const __grid_constant__ Table table, const __grid_constant__ Control c) {
  const Entry& t = entry_of_chunk(table, blockIdx.x);
  const Draw draw = draw_of(c.seed, c.counters[0], c.antithetic);
  for_each_group_of_thread(t, [&](auto group) { sample_group(t, group, draw, c.stochastic_rounding); });
}

template <bool pair>
__global__ void __launch_bounds__(kThreads, 4)
    accumulate_kernel(const __grid_constant__ Table table, const __grid_constant__ Control c) {
  if (skipped(c.options)) return;
  const Entry& t = entry_of_chunk(table, blockIdx.x);
  const Draw draw = draw_of(c.seed, c.counters[0], c.antithetic);
  const Draw next = draw_of(c.seed, c.counters[0] + 1, c.antithetic);
  const float grad_scale = inverse(value_of(c.options.grad_scale_pointer, c.options.grad_scale));
  const Accumulation a{grad_scale, c.counters[1] == 0};
  for_each_group_of_thread(
      t, [&](auto group) { accumulate_group<pair>(t, group, draw, next, c.stochastic_rounding, a); });
}

template <Prior prior, Statistics statistics>
__global__ void __launch_bounds__(kThreads, 4)
    step_kernel(const __grid_constant__ Table table, const __grid_constant__ Control c) {
  constexpr bool with_prior = prior != Prior::kNone;
  const Entry& t = entry_of_chunk(table, blockIdx.x);
  double kl = 0;
  if (!skipped(c.options)) {
    const Options& o = c.options;
    const Update u = update_of(
        o, value_of(o.lr_pointer, o.lr), value_of(o.kl_weight_pointer, o.kl_weight),
        value_of(o.grad_scale_pointer, o.grad_scale), statistics == Statistics::kNone ? 1 : c.counters[1] + 1, with_prior);
    const Draw draw = draw_of(c.seed, c.counters[0], c.antithetic);
    const Draw next = draw_of(c.seed, c.counters[0] + 1, c.antithetic);
    bool finite = true;
    for_each_group_of_thread(t, [&](auto group) {
      step_group<prior, statistics>(t, group, draw, next, c.stochastic_rounding, u, kl, finite);
    });
    if (!finite) c.counters[2] = 1;
  } else if (with_prior) {
    for_each_group_of_thread(t, [&](auto group) { kl_group<false, prior>(t, group, kl); });
  }
  if (with_prior) {
    kl = block_sum(kl);
    if (threadIdx.x == 0) c.partial[blockIdx.x] = kl;
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    gauss_newton_kernel(const __grid_constant__ Table table, const __grid_constant__ Control c) {
  if (skipped(c.options)) return;
  const Entry& t = entry_of_chunk(table, blockIdx.x);
  const Draw next = draw_of(c.seed, c.counters[0] + 1, c.antithetic);
  const float grad_scale = c.options.root_evidence * inverse(value_of(c.options.grad_scale_pointer, c.options.grad_scale));
  bool finite = true;
  for_each_group_of_thread(
      t, [&](auto group) { gauss_newton_group(t, group, next, c.stochastic_rounding, grad_scale, finite); });
  if (!finite) c.counters[2] = 1;
}

__global__ void __launch_bounds__(kThreads, 4)
    gaussian_kl_kernel(const __grid_constant__ Table table, const __grid_constant__ Control c) {
  const Entry& t = entry_of_chunk(table, blockIdx.x);
  double kl = 0;
  for_each_group_of_thread(t, [&](auto group) { kl_group<true, Prior::kFloats>(t, group, kl); });
  kl = block_sum(kl);
  if (threadIdx.x == 0) c.partial[blockIdx.x] = kl;
}

enum class Counting { kNothing, kSample, kUpdate };

// Runs last, in one thread block: the sum of the partial sums in a fixed order, and the counters.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Options options, Counting counting, int64_t* counters, const double* partial, int64_t n, double* out) {
  double kl = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) kl += partial[i];
  kl = block_sum(kl);
  if (threadIdx.x != 0) return;
  if (out) *out = kl;
  if (counting == Counting::kNothing || skipped(options)) return;
  counters[0] += 1;
  counters[1] = counting == Counting::kSample ? counters[1] + 1 : 0;
}

// Launches `kernel` over the model, in as many tables as it takes; advances `partials` by the number of chunks.
template <class Kernel>
cudaError_t launch(Kernel kernel, const Model& m, Control control, int64_t& partials, cudaStream_t stream) {
  double* const partial = control.partial;
  Table table;
  table.tensors = table.chunks = 0;
  const auto flush = [&]() -> cudaError_t {
    if (!table.tensors) return cudaSuccess;
    control.partial = partial + partials;
    kernel<<<static_cast<unsigned>(table.chunks), kThreads, 0, stream>>>(table, control);
    partials += table.chunks;
    table.tensors = table.chunks = 0;
    return cudaGetLastError();
  };
  for (int64_t i = 0; i < m.tensors; ++i) {
    if (!m.numel[i]) continue;
    Entry t = entry_of(m, i);
    const int64_t chunks = (block_count(t) + kBlocksPerChunk - 1) / kBlocksPerChunk;
    if (table.tensors == kCapacity || table.chunks + chunks > INT32_MAX) {
      const cudaError_t error = flush();
      if (error != cudaSuccess) return error;
    }
    t.first_chunk = table.chunks;
    table.entry[table.tensors++] = t;
    table.chunks += static_cast<int32_t>(chunks);
  }
  return flush();
}

Control control_of(const Model& m, const Options& o, double* partial) {
  Control c;
  c.options = o;
  c.counters = m.counters;
  c.seed = static_cast<uint64_t>(m.seed);
  c.antithetic = m.antithetic != 0;
  c.stochastic_rounding = m.stochastic_rounding != 0;
  c.partial = partial;
  return c;
}

}  // namespace
}  // namespace distruction

using namespace distruction;

#define DISTRUCTION_API extern "C" __attribute__((visibility("default")))

// Changes with every change of the interface, so that a stale library is noticed.
DISTRUCTION_API int32_t distruction_abi() { return 5; }

// The toolkit that built it: 1000 times its version and 10 times its release.
DISTRUCTION_API int32_t distruction_cuda_toolkit() { return CUDART_VERSION; }

DISTRUCTION_API const char* distruction_cuda_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// The number of partial sums that a KL over the model needs.
DISTRUCTION_API int64_t distruction_cuda_chunks(const Model* m) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < m->tensors; ++i)
    if (m->numel[i]) chunks += (block_count(entry_of(*m, i)) + kBlocksPerChunk - 1) / kBlocksPerChunk;
  return chunks;
}

// The launchers: on `device` and `stream`, in order; each returns a cudaError_t.

DISTRUCTION_API int32_t distruction_cuda_sample(int32_t device, cudaStream_t stream, const Model* m) {
  cudaError_t error = cudaSetDevice(device);
  int64_t partials = 0;
  if (error == cudaSuccess) error = launch(sample_kernel, *m, control_of(*m, Options{}, nullptr), partials, stream);
  return error;
}

DISTRUCTION_API int32_t distruction_cuda_accumulate(
    int32_t device, cudaStream_t stream, const Model* m, const Options* o) {
  cudaError_t error = cudaSetDevice(device);
  int64_t partials = 0;
  const auto kernel = m->m2 ? accumulate_kernel<false> : accumulate_kernel<true>;
  if (error == cudaSuccess) error = launch(kernel, *m, control_of(*m, *o, nullptr), partials, stream);
  if (error != cudaSuccess) return error;
  finish_kernel<<<1, kThreads, 0, stream>>>(*o, Counting::kSample, m->counters, nullptr, 0, nullptr);
  return cudaGetLastError();
}

DISTRUCTION_API int32_t distruction_cuda_step(
    int32_t device, cudaStream_t stream, const Model* m, const Options* o, double* partial, double* kl) {
  const auto kernel = for_variant(*m, [](auto prior, auto statistics) {
    return &step_kernel<decltype(prior)::value, decltype(statistics)::value>;
  });
  cudaError_t error = cudaSetDevice(device);
  int64_t partials = 0;
  if (error == cudaSuccess) error = launch(kernel, *m, control_of(*m, *o, partial), partials, stream);
  if (error != cudaSuccess) return error;
  const int64_t sums = m->prior_mean ? partials : 0;
  finish_kernel<<<1, kThreads, 0, stream>>>(*o, Counting::kUpdate, m->counters, partial, sums, kl);
  return cudaGetLastError();
}

DISTRUCTION_API int32_t distruction_cuda_gauss_newton(
    int32_t device, cudaStream_t stream, const Model* m, const Options* o) {
  cudaError_t error = cudaSetDevice(device);
  int64_t partials = 0;
  if (error == cudaSuccess) error = launch(gauss_newton_kernel, *m, control_of(*m, *o, nullptr), partials, stream);
  if (error != cudaSuccess) return error;
  finish_kernel<<<1, kThreads, 0, stream>>>(*o, Counting::kUpdate, m->counters, nullptr, 0, nullptr);
  return cudaGetLastError();
}

DISTRUCTION_API int32_t distruction_cuda_gaussian_kl(
    int32_t device, cudaStream_t stream, const Model* m, double* partial, double* kl) {
  cudaError_t error = cudaSetDevice(device);
  int64_t partials = 0;
  if (error == cudaSuccess)
    error = launch(gaussian_kl_kernel, *m, control_of(*m, Options{}, partial), partials, stream);
  if (error != cudaSuccess) return error;
  finish_kernel<<<1, kThreads, 0, stream>>>(Options{}, Counting::kNothing, nullptr, partial, partials, kl);
  return cudaGetLastError();
}
