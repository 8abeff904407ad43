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

DISTRUCTION_NOINLINE void negate(int n, const float* __restrict x, float* __restrict out) {
  for_each_vector(n, [=](auto access, int i) { access.store(out + i, -access.load(x + i, Float{})); });
}

// Elements from which on a tensor's samples bypass the caches: 512 KiB would push out what the step still needs.
constexpr int64_t kStreamed = 1 << 17;

// The samples of a piece on their way into the parameter.
struct Samples {
  const Model& m;
  const int64_t t;
  const Piece& p;
  Buffers& b;
  const uint32_t stream = static_cast<uint32_t>(m.stream[t]);
  const bool wide = m.param_type[t] == kFloat32;

  // The normals of the piece's draw, in b.next from p.lead on.
  void generate_normals(Draw draw) const {
    if (stochastic())
      generate<true, true>(p.block, p.lead + p.n, draw, stream, b.words, b.next);
    else
      generate<false, true>(p.block, p.lead + p.n, draw, stream, nullptr, b.next);
  }
  // Those of two successive draws, the first in b.eps.
  void generate_normals(Draw draw, Draw next) const {
    generate<false, true>(p.block, p.lead + p.n, draw, stream, nullptr, b.eps);
    if (draw.number == next.number && !stochastic())
      negate(p.lead + p.n, b.eps, b.next);  // an antithetic pair
    else
      generate_normals(next);
  }
  // Where to write mean + std * eps.
  float* theta() const { return wide ? static_cast<float*>(m.param[t]) + p.index : b.theta; }
  bool streamed() const {
    return wide && m.numel[t] >= kStreamed && reinterpret_cast<uintptr_t>(theta()) % sizeof(Float) == 0;
  }
  void finish() const {
    if (!wide)
      narrow(static_cast<uint16_t*>(m.param[t]) + p.index, m.param_type[t], p.n, b.theta,
             stochastic() ? b.words + p.lead : nullptr);
  }

 private:
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
    generate<true, false>(block, static_cast<int>(4 * n), {seed, number, 1.0f}, stream, buffer, nullptr);
    memcpy(out, buffer, n * 16);
    block += n;
    out += 4 * n;
    left -= n;
  }
}

DISTRUCTION_NOINLINE void sample_piece(
    int n, const float* mean, const float* std, const float* __restrict eps, float* __restrict theta, bool streamed) {
  for_each_vector(n, [=](auto access, int i) {
    const Float mu = access.load(mean + i, Float{}), sigma = access.load(std + i, Float{});
    access.store_sample(theta + i, mu + sigma * access.load(eps + i, Float{}), streamed);
  });
}

void sample(const Model& m, Range r, Draw draw) {
  const int64_t t = r.tensor;
  for_each_piece(m, r, [&](Piece p) {
    Buffers b;
    const Samples samples{m, t, p, b};
    samples.generate_normals(draw);
    sample_piece(p.n, m.mean[t] + p.index, m.std[t] + p.index, b.next + p.lead, samples.theta(),
                 samples.streamed());
    samples.finish();
  });
  end_of_stream();
}

template <bool pair>
DISTRUCTION_NOINLINE void accumulate_piece(
    int n, Accumulation a, const float* __restrict grad, const float* __restrict eps, const float* __restrict next,
    const float* __restrict mean, const float* __restrict std, float* __restrict m1, float* __restrict m2,
    float* __restrict theta, bool streamed) {
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
    access.store_sample(theta + i, mu + sigma * access.load(next + i, Float{}), streamed);
  });
}

template <bool pair>
void accumulate_range(const Model& m, Range r, Draw draw, Draw next, const Accumulation& a) {
  const int64_t t = r.tensor;
  for_each_piece(m, r, [&](Piece p) {
    Buffers b;
    const Samples samples{m, t, p, b};
    if (pair)
      samples.generate_normals(next);
    else
      samples.generate_normals(draw, next);
    accumulate_piece<pair>(p.n, a, gradient(m, t, p, b), b.eps + p.lead, b.next + p.lead, m.mean[t] + p.index,
                           m.std[t] + p.index, m.m1[t] + p.index, pair ? nullptr : m.m2[t] + p.index, samples.theta(),
                           samples.streamed());
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

template <bool with_prior, Statistics statistics>
DISTRUCTION_NOINLINE void update_piece(
    int n, Update u, const float* __restrict grad, const float* __restrict eps, const float* __restrict next,
    float* __restrict theta, bool streamed, float* __restrict mean, float* __restrict std, const float* __restrict m1,
    const float* __restrict m2, const float* __restrict prior_mean, const float* __restrict prior_std, bool& finite) {
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
    kept |= access.used(~is_finite);
    if (u.learn_mean) access.store(mean + i, mu);
    if (u.learn_std) access.store(std + i, sigma);
    access.store_sample(theta + i, mu + sigma * access.load(next + i, Float{}), streamed);
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
    const Samples samples{m, t, p, b};
    samples.generate_normals(draw, next);
    float *mean = m.mean[t] + i, *std = m.std[t] + i;
    const PriorPiece at = prior_of<prior>(m, t, p, b);
    update_piece<with_prior, statistics>(
        p.n, u, gradient(m, t, p, b), b.eps + p.lead, b.next + p.lead, samples.theta(), samples.streamed(), mean, std,
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
    const float* __restrict next, float* __restrict theta, bool streamed, bool& finite) {
  Int kept = {};
  for_each_vector(n, [&](auto access, int i) __attribute__((always_inline)) {
    Float sigma = access.load(std + i, Float{});
    Int is_finite;
    gauss_newton(access.load(grad + i, Float{}), grad_scale, sigma, is_finite);
    kept |= ~is_finite;
    access.store(std + i, sigma);
    const Float mu = access.load(mean + i, Float{});
    access.store_sample(theta + i, mu + sigma * access.load(next + i, Float{}), streamed);
  });
  for (int i = 0; i < kLanes; ++i) finite = finite && !kept[i];
}

void gauss_newton(const Model& m, Range r, Draw next, float grad_scale, bool& finite) {
  const int64_t t = r.tensor;
  for_each_piece(m, r, [&](Piece p) {
    Buffers b;
    const Samples samples{m, t, p, b};
    samples.generate_normals(next);
    gauss_newton_piece(p.n, grad_scale, gradient(m, t, p, b), m.mean[t] + p.index, m.std[t] + p.index,
                       b.next + p.lead, samples.theta(), samples.streamed(), finite);
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
