// The CPU kernels in vectors. Each instruction set's file defines DISTRUCTION_SET and includes this one.
//
// A range is processed in pieces that stay in the level-1 cache: the normals of a piece first, by whole groups of
// generator blocks and so independent of where a tensor or a shard begins, then one pass over the arrays.
#include "access.h"  // first, with normals.h: the templates of the others find their vectors
#include "normals.h"

#include "../kl.h"
#include "kernels.h"

namespace distruction {
namespace {

static_assert(kPiece % kUnit == 0, "a piece is a whole number of rounds of the generator");

// One piece of a tensor and the normals of its elements.
struct Piece {
  int64_t index;  // of the first element, in the tensor
  int n, lead;    // elements; position of the first one in its generator block
  uint64_t block;
};

template <class F>
DISTRUCTION_FN void for_each_piece(const Model& m, Range r, F f) {
  for (int64_t begin = r.begin; begin < r.end;) {
    const int64_t boundary = begin / kPiece * kPiece + kPiece;
    const int64_t end = boundary < r.end ? boundary : r.end;
    f(Piece{begin - m.offset[r.tensor], static_cast<int>(end - begin), static_cast<int>(begin % 4),
            static_cast<uint64_t>(begin / 4)});
    begin = end;
  }
}

// The buffers of a piece; the lead is less than a block, and a piece with a lead is shorter than kPiece by it. The
// gradient and the samples pass through theirs if they have 16 bits, a prior if it has fewer than 32.
struct alignas(64) Buffers {
  float eps[kPiece], next[kPiece], grad[kPiece], theta[kPiece], prior_mean[kPiece], prior_std[kPiece];
  uint32_t words[kPiece];
};

// The second sample of an antithetic pair from the first one.
DISTRUCTION_FN Float mirror_image(Float theta, Float mean) { return 2.0f * mean - theta; }

// A sample from the normals of its draw or, where it is the second of a pair, from those of the first one. Whoever writes
// a sample goes through here, so that all write the same bits.
DISTRUCTION_FN Float sample_of(Float mean, Float std, Float eps, bool second) {
  const Float theta = mean + std * eps;
  return second ? mirror_image(theta, mean) : theta;
}

// Elements from which on a tensor's samples bypass the caches: 512 KiB would push out what the step still needs.
constexpr int64_t kStreamed = 1 << 17;

// Where the samples of a piece go, and whether they bypass the caches and are the second ones of pairs.
struct Target {
  float* theta;
  bool streamed, second;
};

// The samples of a piece on their way into the parameter.
struct Samples {
  const Model& m;
  const int64_t t;
  const Piece& p;
  Buffers& b;
  const Draw draw;
  const uint32_t stream = static_cast<uint32_t>(m.stream[t]);
  const bool wide = m.param_type[t] == kFloat32;
  const float* reads[7];  // of the piece
  int count = 0;

  Samples(const Model& model, int64_t tensor, const Piece& piece, Buffers& buffers, Draw of)
      : m(model), t(tensor), p(piece), b(buffers), draw(of) {
    const auto add = [&](const void* array) { reads[count++] = static_cast<const float*>(array) + p.index; };
    add(m.mean[t]);
    add(m.std[t]);
    if (m.grad && m.grad_type[t] == kFloat32) add(m.grad[t]);
    if (m.m1) add(m.m1[t]);
    if (m.m2) add(m.m2[t]);
    if (m.prior_mean && m.prior_mean_type[t] == kFloat32) add(m.prior_mean[t]);
    if (m.prior_std) add(m.prior_std[t]);
  }

  // The normals that `sample_of` takes.
  const float* normals() const { return normals({reads, reads + count}); }
  // The same, and those of the draw before in b.eps.
  const float* normals_after(Draw before) const {
    const bool same = is_second_of(before) && !stochastic();
    const float* const* const middle = reads + (same ? count : count / 2);
    generate<false, true>(p.block, p.lead + p.n, before, stream, nullptr, b.eps, {reads, middle});
    return same ? b.eps + p.lead : normals({middle, reads + count});
  }
  bool is_second_of(Draw before) const { return before.number == draw.number; }
  Target target() const {
    float* const theta = wide ? static_cast<float*>(m.param[t]) + p.index : b.theta;
    const bool whole = reinterpret_cast<uintptr_t>(theta) % sizeof(Float) == 0;
    return {theta, wide && m.numel[t] >= kStreamed && whole, draw.sign != 0};
  }
  void finish() const {
    if (!wide)
      narrow(static_cast<uint16_t*>(m.param[t]) + p.index, m.param_type[t], p.n, b.theta,
             stochastic() ? b.words + p.lead : nullptr);
  }

 private:
  const float* normals(Ahead ahead) const {
    const Draw first{draw.seed, draw.number, 0u};
    if (stochastic())
      generate<true, true>(p.block, p.lead + p.n, first, stream, b.words, b.next, ahead);
    else
      generate<false, true>(p.block, p.lead + p.n, first, stream, nullptr, b.next, ahead);
    return b.next + p.lead;
  }
  bool stochastic() const { return m.stochastic_rounding && m.param_type[t] == kBFloat16; }
};

DISTRUCTION_FN const float* gradient(const Model& m, int64_t t, const Piece& p, Buffers& b) {
  if (m.grad_type[t] == kFloat32) return static_cast<const float*>(m.grad[t]) + p.index;
  widen(static_cast<const uint16_t*>(m.grad[t]) + p.index, m.grad_type[t], p.n, b.grad);
  return b.grad;
}

struct PriorPiece {
  const float *mean, *std;
};

template <Prior prior>
DISTRUCTION_FN PriorPiece prior_of(const Model& m, int64_t t, const Piece& p, Buffers& b) {
  if (prior == Prior::kNone) return {nullptr, nullptr};
  const float* mean = static_cast<const float*>(m.prior_mean[t]) + p.index;
  if (prior == Prior::kFloats) return {mean, m.prior_std[t] + p.index};
  if (m.prior_mean_type[t] != kFloat32) {
    widen(static_cast<const uint16_t*>(m.prior_mean[t]) + p.index, m.prior_mean_type[t], p.n, b.prior_mean);
    mean = b.prior_mean;
  }
  static_assert(kCodesPerBlock % kPiece == 0, "a piece's codes share a block");
  const int64_t block = (p.index + m.offset[t]) / kCodesPerBlock;
  restore(m.prior_codes[t] + p.index, m.prior_low[t][block], rate_of(m.prior_step[t][block]), p.n, b.prior_std);
  return {mean, b.prior_std};
}

void words(uint64_t block, int64_t blocks, uint32_t number, uint32_t stream, uint64_t seed, uint32_t* out) {
  constexpr uint64_t kBlocks = kPiece / 4;
  uint32_t buffer[kPiece];
  for (uint64_t left = static_cast<uint64_t>(blocks); left;) {
    const uint64_t most = kBlocks - block % kBlocks, n = most < left ? most : left;
    generate<true, false>(block, static_cast<int>(4 * n), {seed, number, 0u}, stream, buffer, nullptr, {});
    memcpy(out, buffer, n * 16);
    block += n;
    out += 4 * n;
    left -= n;
  }
}

DISTRUCTION_NOINLINE void sample_piece(
    int n, const float* mean, const float* std, const float* __restrict eps, Target to) {
  float* const __restrict theta = to.theta;
  for_each_vector(n, [=](auto access, int i) {
    const Float mu = access.load(mean + i, Float{}), sigma = access.load(std + i, Float{});
    access.store_sample(theta + i, sample_of(mu, sigma, access.load(eps + i, Float{}), to.second), to.streamed);
  });
}

void sample(const Model& m, Range r, Draw draw) {
  const int64_t t = r.tensor;
  for_each_piece(m, r, [&](Piece p) {
    Buffers b;
    const Samples samples{m, t, p, b, draw};
    sample_piece(p.n, m.mean[t] + p.index, m.std[t] + p.index, samples.normals(), samples.target());
    samples.finish();
  });
  end_of_stream();
}

template <bool pair>
DISTRUCTION_NOINLINE void accumulate_piece(
    int n, Accumulation a, const float* __restrict grad, const float* __restrict eps, const float* __restrict next,
    const float* __restrict mean, const float* __restrict std, float* __restrict m1, float* __restrict m2, Target to) {
  float* const __restrict theta = to.theta;
  for_each_vector(n, [=](auto access, int i) {
    const Float mu = access.load(mean + i, Float{}), sigma = access.load(std + i, Float{});
    Float g = access.load(grad + i, Float{}) * a.grad_scale;
    if (!pair) {
      Float g_eps = g * access.load(eps + i, Float{});
      if (!a.first) {
        g += access.load(m1 + i, Float{});
        g_eps += access.load(m2 + i, Float{});
      }
      access.store(m2 + i, g_eps);
    }
    access.store(m1 + i, g);
    access.store_sample(theta + i, sample_of(mu, sigma, access.load(next + i, Float{}), to.second), to.streamed);
  });
}

// Of a pair in float32: the first sample, which is in theta, becomes the second without any normals. Read just before, it
// is in the caches whatever its size.
DISTRUCTION_NOINLINE void mirror_piece(
    int n, float grad_scale, const float* __restrict grad, const float* __restrict mean, float* __restrict m1,
    float* __restrict theta) {
  for_each_vector(n, [=](auto access, int i) {
    access.store(m1 + i, access.load(grad + i, Float{}) * grad_scale);
    access.store(theta + i, mirror_image(access.load(theta + i, Float{}), access.load(mean + i, Float{})));
  });
}

template <bool pair>
void accumulate_range(const Model& m, Range r, Draw draw, Draw next, const Accumulation& a) {
  const int64_t t = r.tensor;
  for_each_piece(m, r, [&](Piece p) {
    Buffers b;
    const Samples samples{m, t, p, b, next};
    const float *grad = gradient(m, t, p, b), *mean = m.mean[t] + p.index;
    float* const m1 = m.m1[t] + p.index;
    if (pair && samples.wide && samples.is_second_of(draw))
      return mirror_piece(p.n, a.grad_scale, grad, mean, m1, samples.target().theta);
    const float* normals = pair ? samples.normals() : samples.normals_after(draw);
    accumulate_piece<pair>(p.n, a, grad, b.eps + p.lead, normals, mean, m.std[t] + p.index, m1,
                           pair ? nullptr : m.m2[t] + p.index, samples.target());
    samples.finish();
  });
  end_of_stream();
}

void accumulate(const Model& m, Range r, Draw draw, Draw next, const Accumulation& a) {
  m.m2 ? accumulate_range<false>(m, r, draw, next, a) : accumulate_range<true>(m, r, draw, next, a);
}

template <bool with_gradients>
DISTRUCTION_NOINLINE double kl_piece(
    int n, const float* __restrict mean, const float* __restrict std, const float* __restrict prior_mean,
    const float* __restrict prior_std, float* __restrict grad_mean, float* __restrict grad_std) {
  Double total = {};
  for_each_vector(n, [&](auto access, int i) __attribute__((always_inline)) {
    Float kl, g_mean, g_std;
    kl_with_gradients(
        access.load(mean + i, Float{}), access.load(std + i, splat<Float>(1.0f)), access.load(prior_mean + i, Float{}),
        access.load(prior_std + i, splat<Float>(1.0f)), kl, g_mean, g_std);
    total += to_double(access.used(kl));
    if (with_gradients) {
      access.store(grad_mean + i, g_mean);
      access.store(grad_std + i, g_std);
    }
  });
  double kl = 0;
  for (int i = 0; i < kLanes / 2; ++i) kl += total[i];
  return kl;
}

// `usual`: the options are BGD's defaults, which the compiler then need not ask for in each round of the loop.
template <bool with_prior, Statistics statistics, bool usual>
DISTRUCTION_NOINLINE void update_piece(
    int n, Update u, const float* __restrict grad, const float* __restrict eps, const float* __restrict next, Target to,
    float* __restrict mean, float* __restrict std, const float* __restrict m1, const float* __restrict m2,
    const float* __restrict prior_mean, const float* __restrict prior_std, bool& finite) {
  if (usual) u.small_a = u.learn_mean = u.learn_std = true, to.second = false;
  float* const __restrict theta = to.theta;
  Int kept = {};
  for_each_vector(n, [&](auto access, int i) __attribute__((always_inline)) {
    const Float first = statistics == Statistics::kNone ? Float{} : access.load(m1 + i, Float{});
    const Float second = statistics == Statistics::kSums ? access.load(m2 + i, Float{}) : Float{};
    Float s1 = access.load(grad + i, Float{}), s2 = access.load(eps + i, Float{});
    add_up<statistics>(u, first, second, s1, s2);
    Float mu = access.load(mean + i, Float{}), sigma = access.load(std + i, splat<Float>(1.0f));
    const Float prior_mu = with_prior ? access.load(prior_mean + i, Float{}) : mu;
    const Float prior_sigma = with_prior ? access.load(prior_std + i, splat<Float>(1.0f)) : sigma;
    Int is_finite;
    update<with_prior>(u, s1, s2, prior_mu, prior_sigma, mu, sigma, is_finite);
    if (!all(is_finite)) kept |= access.used(~is_finite);
    if (u.learn_mean) access.store(mean + i, mu);
    if (u.learn_std) access.store(std + i, sigma);
    access.store_sample(theta + i, sample_of(mu, sigma, access.load(next + i, Float{}), to.second), to.streamed);
  });
  for (int i = 0; i < kLanes; ++i) finite = finite && !kept[i];
}

template <Prior prior, Statistics statistics>
double step_range(const Model& m, Range r, Draw draw, Draw next, const Update& u, bool& finite) {
  constexpr bool with_prior = prior != Prior::kNone;
  const int64_t t = r.tensor;
  double kl = 0;
  for_each_piece(m, r, [&](Piece p) {
    Buffers b;
    const int64_t i = p.index;
    const Samples samples{m, t, p, b, next};
    const float* normals = samples.normals_after(draw);
    float *mean = m.mean[t] + i, *std = m.std[t] + i;
    const PriorPiece at = prior_of<prior>(m, t, p, b);
    const Target to = samples.target();
    const auto update = u.small_a && u.learn_mean && u.learn_std && !to.second
                            ? update_piece<with_prior, statistics, true>
                            : update_piece<with_prior, statistics, false>;
    update(p.n, u, gradient(m, t, p, b), b.eps + p.lead, normals, to, mean, std,
           statistics == Statistics::kNone ? nullptr : m.m1[t] + i,
           statistics == Statistics::kSums ? m.m2[t] + i : nullptr, at.mean, at.std, finite);
    // A second pass over the cached piece: one loop's chain of operations would be too long to overlap with the next's.
    if (with_prior) kl += kl_piece<false>(p.n, mean, std, at.mean, at.std, nullptr, nullptr);
    samples.finish();
  });
  end_of_stream();
  return kl;
}

double step(const Model& m, Range r, Draw draw, Draw next, const Update& u, bool& finite) {
  return for_variant(m, [&](auto prior, auto statistics) {
    return step_range<prior.value, statistics.value>(m, r, draw, next, u, finite);
  });
}

DISTRUCTION_NOINLINE void gauss_newton_piece(
    int n, float grad_scale, const float* __restrict grad, const float* __restrict mean, float* __restrict std,
    const float* __restrict next, Target to, bool& finite) {
  float* const __restrict theta = to.theta;
  Int kept = {};
  for_each_vector(n, [&](auto access, int i) __attribute__((always_inline)) {
    Float sigma = access.load(std + i, Float{});
    Int is_finite;
    gauss_newton(access.load(grad + i, Float{}), grad_scale, sigma, is_finite);
    kept |= ~is_finite;
    access.store(std + i, sigma);
    const Float mu = access.load(mean + i, Float{});
    access.store_sample(theta + i, sample_of(mu, sigma, access.load(next + i, Float{}), to.second), to.streamed);
  });
  for (int i = 0; i < kLanes; ++i) finite = finite && !kept[i];
}

void gauss_newton(const Model& m, Range r, Draw next, float grad_scale, bool& finite) {
  const int64_t t = r.tensor;
  for_each_piece(m, r, [&](Piece p) {
    Buffers b;
    const Samples samples{m, t, p, b, next};
    gauss_newton_piece(p.n, grad_scale, gradient(m, t, p, b), m.mean[t] + p.index, m.std[t] + p.index,
                       samples.normals(), samples.target(), finite);
    samples.finish();
  });
  end_of_stream();
}

template <Prior prior>
double kl_range(const Model& m, Range r) {
  const int64_t t = r.tensor;
  double kl = 0;
  for_each_piece(m, r, [&](Piece p) {
    Buffers b;
    const int64_t i = p.index;
    const float *mean = m.mean[t] + i, *std = m.std[t] + i;
    const PriorPiece at = prior_of<prior>(m, t, p, b);
    kl += m.grad_mean ? kl_piece<true>(p.n, mean, std, at.mean, at.std, m.grad_mean[t] + i, m.grad_std[t] + i)
                      : kl_piece<false>(p.n, mean, std, at.mean, at.std, nullptr, nullptr);
  });
  return kl;
}

double gaussian_kl(const Model& m, Range r) {
  return m.prior_codes ? kl_range<Prior::kCodes>(m, r) : kl_range<Prior::kFloats>(m, r);
}

}  // namespace

extern const Kernels DISTRUCTION_SET = {DISTRUCTION_SET_NAME, words, sample, accumulate, step, gauss_newton, gaussian_kl};

}  // namespace distruction
