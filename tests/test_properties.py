"""Properties of BGD over random shapes, types and options: float64 maths written here, from the paper of the rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from distruction import BGD, Posterior

SHAPES = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4).filter(
    lambda shapes: any(math.prod(s) for s in shapes)
)
BOUNDS = st.sampled_from([0.01, 0.1, 1.0, math.inf])
OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 0.3, 1.0]),
        "data_per_step": st.sampled_from([1.0, 50.0]),
        "mc_samples": st.integers(1, 4),
        "antithetic": st.booleans(),
        "kl_weight": st.sampled_from([0.0, 0.2, 0.9, 1.0]),
        "max_mean_step": BOUNDS,
        "max_log_std_step": BOUNDS,
        "max_std": st.sampled_from([0.05, 0.2, math.inf]),
        "learn_mean": st.booleans(),
        "learn_std": st.booleans(),
        "maximize": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
    }
)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


class Weights(nn.Module):
    def __init__(self, shapes, dtype, seed):
        super().__init__()
        g = torch.Generator().manual_seed(seed % 2**32)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes)


def update(mean, std, m1, m2, prior, o):
    """One update in float64: Zeno et al. 2018 with the KL's gradients, its pull on the mean implicit."""
    weight = o["kl_weight"] if prior else 0.0
    scale = (1 - weight) * o["data_per_step"] * (-1 if o["maximize"] else 1)
    a = std * scale * m2 / 2
    if prior:
        a = a + weight * ((std / prior[1]) ** 2 - 1) / 2  # std / 2 times dKL/dstd = std / std_p**2 - 1 / std
    log_step = torch.asinh(a).clamp(-o["max_log_std_step"], o["max_log_std_step"])
    step = (o["lr"] * std**2 * scale * m1).clamp(-o["max_mean_step"] * std, o["max_mean_step"] * std)
    new_mean = mean - step
    if prior:
        pull = o["lr"] * weight * (std / prior[1]) ** 2
        new_mean = (new_mean + pull * prior[0]) / (1 + pull)
    new_std = (std * torch.exp(-log_step)).clamp(max=o["max_std"])
    return new_mean if o["learn_mean"] else mean, new_std if o["learn_std"] else std


@settings(deadline=None, max_examples=150)
@given(SHAPES, TYPES, OPTIONS, st.booleans(), st.booleans())
def test_updates_are_those_of_float64(shapes, dtype, options, with_prior, release):
    model = Weights(shapes, dtype, options["seed"])
    named = list(model.named_parameters())
    g = torch.Generator().manual_seed(1)
    initial = Posterior.around(model, {n: 0.01 + 0.1 * torch.rand(p.shape, generator=g) for n, p in named})
    prior = Posterior(
        {n: m + 0.1 * torch.randn(m.shape, generator=g) for n, m in initial.means.items()},
        {n: s * (0.5 + torch.rand(s.shape, generator=g)) for n, s in initial.stds.items()},
    )
    o = options if with_prior else {**options, "kl_weight": 0.0}
    opt = BGD(named, std_init=initial, prior=prior if with_prior else None, release_gradients=release, **o)
    # The gradient is a constant of our choosing, so that float64 gets the same one; eps is told by the sample.
    opt.train()
    grads, draws = [], []
    for _ in range(o["mc_samples"]):
        draws.append([opt_eps(opt, p, o, len(draws)) for _, p in named])
        grads.append([torch.randn(p.shape, generator=g).to(dtype) for _, p in named])
        opt.zero_grad()
        sum((p * grad).sum() for (_, p), grad in zip(named, grads[-1], strict=True)).backward()
        opt.step()
    after = opt.posterior()
    total = 0.0
    for i, (name, p) in enumerate(named):
        mean, std = (t.double() for t in initial[name])
        m1 = torch.stack([grad[i].double() for grad in grads]).mean(0)
        m2 = torch.stack([grad[i].double() * eps[i].double() for grad, eps in zip(grads, draws, strict=True)]).mean(0)
        pair = tuple(t.double() for t in prior[name]) if with_prior else None
        new_mean, new_std = update(mean, std, m1, m2, pair, o)
        torch.testing.assert_close(after.means[name].double(), new_mean, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(after.stds[name].double(), new_std, rtol=1e-4, atol=0)
        assert after.means[name].shape == p.shape
        if pair and p.numel():
            total += kl_divergence(Normal(*(t.double() for t in after[name])), Normal(*pair)).sum().item()
    if with_prior:
        assert opt.kl.item() == pytest.approx(total, rel=1e-4, abs=1e-4)
    # The next sample is drawn already, in the parameters' type; eval puts the means back.
    opt.eval()
    for name, p in named:
        assert torch.equal(p.detach(), after.means[name].to(dtype))


def opt_eps(opt, p, o, sample):
    """The normals of a sample: what a posterior of mean 0 and std 1 would draw (known answers are in test_philox)."""
    stream = next(i for i, q in enumerate(opt.param_groups[0]["params"]) if q is p)
    like = [nn.Parameter(torch.zeros(q.shape)) for q in opt.param_groups[0]["params"]]
    unit = BGD(like, std_init=1.0, max_std=1.0, antithetic=o["antithetic"], seed=o["seed"])
    unit.param_groups[0]["draw"] = sample
    unit.train()
    return like[stream].detach().clone()


@settings(deadline=None, max_examples=60)
@given(SHAPES, TYPES, OPTIONS, st.integers(0, 6))
def test_any_state_dict_resumes_with_the_same_bits(shapes, dtype, options, cut):
    def steps(opt, model, numbers):
        opt.train()
        for i in numbers:
            g = torch.Generator().manual_seed(i)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g).to(dtype)
            opt.step()

    def fresh():
        model = Weights(shapes, dtype, 0)
        return model, BGD(model.named_parameters(), **{**options, "kl_weight": 0.0})  # no prior

    model, opt = fresh()
    steps(opt, model, range(6))
    first, first_opt = fresh()
    steps(first_opt, first, range(cut))
    second, second_opt = fresh()
    second_opt.load_state_dict(first_opt.state_dict())
    steps(second_opt, second, range(cut, 6))
    for p, q in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(t, second_opt.state[q][k]) for k, t in opt.state[p].items())
