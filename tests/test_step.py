"""The BGD update against closed forms: its quadratic, conjugate Gaussians, and the forgetting objective's gradients."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from distruction import ops

INF = math.inf
FREE = {"max_mean_step": INF, "max_log_std_step": INF, "max_std": INF}
SCALARS = {"lr": 1.0, "kl_weight": 0.0}


def bgd_step(mean, std, m1, m2, *, prior=None, **options):
    """One update with exact expectations, which go in as the statistics of the samples before a zero gradient."""
    scalars = {name: torch.tensor(options.pop(name, x), dtype=torch.float64) for name, x in SCALARS.items()}
    rule = ops.Rule(**scalars, **{"loss_scale": 1.0, **FREE, **options})
    mean, std = mean.clone(), std.clone()
    param, counters = torch.empty_like(mean), torch.zeros(3, dtype=torch.int64)
    state = ops.State([mean], [std], [m1.clone()], [m2.clone()], *([t] for t in prior or ()))
    draws = ops.Draws([0], [0], 1, counters)
    kl = ops.step([param], [torch.zeros_like(mean)], state, draws, rule, backend="reference")
    return mean, std, kl, counters


def random(n=500, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean, m1 = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    std = 10 ** (-3 * torch.rand(n, generator=g, dtype=torch.float64))
    m2 = torch.randn(n, generator=g, dtype=torch.float64) * 10 ** (
        6 * torch.rand(n, generator=g, dtype=torch.float64) - 2
    )
    return mean, std, m1, m2


def test_std_is_the_positive_root():
    mean, std, m1, m2 = random()
    new_mean, new_std, _, _ = bgd_step(mean, std, m1, m2, lr=0.3)
    b = std**2 * m2
    root = torch.where(
        b > 0, 2 * std**2 / (b + torch.sqrt(b * b + 4 * std**2)), (-b + torch.sqrt(b * b + 4 * std**2)) / 2
    )
    torch.testing.assert_close(new_std, root, rtol=1e-12, atol=0)
    assert (new_std > 0).all()
    torch.testing.assert_close(new_mean, mean - 0.3 * std**2 * m1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("a", [1e-9, 1.0, 1e4, 1e8])
def test_float32_std_stays_positive_for_any_curvature(a):
    std = torch.full((2,), 0.05)
    m2 = torch.tensor([2 * a / 0.05, -2 * a / 0.05])
    _, new_std, _, _ = bgd_step(torch.zeros(2), std, torch.zeros(2), m2)
    expected = 0.05 * torch.exp(-torch.asinh(std.double() * m2.double() / 2))
    torch.testing.assert_close(new_std.double(), expected, rtol=1e-6, atol=0)


def test_linear_regression_tends_to_the_conjugate_posterior():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(200, 6, generator=g, dtype=torch.float64)
    noise, std_init = 0.7, 0.4
    hessian = x.T @ x / noise**2
    errors = []
    for batches in (10, 100, 1000):
        std = torch.full((6,), std_init, dtype=torch.float64)
        for _ in range(batches):
            # E[g * eps] of a quadratic loss with Hessian H is diag(H) * std.
            m2 = hessian.diagonal() / batches * std
            _, std, _, _ = bgd_step(torch.zeros_like(std), std, torch.zeros_like(std), m2)
        precision = std_init**-2 + hessian.diagonal()
        errors.append(((std**-2 - precision).abs() / precision).max().item())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 0.003


def test_sampled_gradients_tend_to_the_same_posterior():
    hessian, std_init = 50.0, 0.1
    n = 20_000
    mean, std, param = torch.zeros(n), torch.full((n,), std_init), torch.empty(n)
    counters = torch.zeros(3, dtype=torch.int64)
    state, draws = ops.State([mean], [std]), ops.Draws([0], [0], 5, counters, antithetic=True)
    rule = ops.Rule(torch.tensor(1.0), torch.tensor(0.0), loss_scale=1.0, **FREE, learn_mean=False)
    ops.sample([param], state, draws, backend="reference")
    steps = 50
    for _ in range(steps):
        ops.step([param], [hessian * param / steps], state, draws, rule, backend="reference")
    # The noise of one sample's g * eps widens log std; its mean over many parameters is the conjugate value.
    assert (std**-2).mean().item() == pytest.approx(std_init**-2 + hessian, rel=0.02)


def test_forgetting_follows_the_gradients_of_its_objective():
    mean, std, m1, m2 = random()
    prior_mean, prior_std, _, _ = random(seed=1)
    lr, weight, scale = 0.5, 0.3, 7.0
    new_mean, new_std, new_kl, _ = bgd_step(
        mean, std, m1, m2, prior=(prior_mean, prior_std), lr=lr, kl_weight=weight, loss_scale=scale
    )

    def kl_at(at_mean, at_std):
        return kl_divergence(Normal(at_mean, at_std), Normal(prior_mean, prior_std)).sum()

    # Implicit in the KL: its gradient is taken at the new mean.
    leaf_mean, leaf_std = new_mean.clone().requires_grad_(), std.clone().requires_grad_()
    kl_mean, kl_std = torch.autograd.grad(kl_at(leaf_mean, leaf_std), (leaf_mean, leaf_std))
    grad_mean = (1 - weight) * scale * m1 + weight * kl_mean
    grad_std = (1 - weight) * scale * m2 + weight * kl_std
    torch.testing.assert_close(new_mean, mean - lr * std**2 * grad_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new_std, std * torch.exp(-torch.asinh(std * grad_std / 2)), rtol=1e-9, atol=0)
    torch.testing.assert_close(new_kl, kl_at(new_mean, new_std), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kl_weight", [0.1, 0.5, 1.0])
def test_implicit_pull_never_overshoots_the_prior(kl_weight):
    mean = torch.tensor([1.0, -1.0], dtype=torch.float64)
    std, prior = torch.full_like(mean, 1.0), (torch.zeros_like(mean), torch.full_like(mean, 1e-3))
    zero = torch.zeros_like(mean)
    new_mean, _, _, _ = bgd_step(mean, std, zero, zero, prior=prior, lr=1.0, kl_weight=kl_weight)
    v = kl_weight * 1e6
    torch.testing.assert_close(new_mean, mean / (1 + v), rtol=1e-9, atol=0)


def test_trust_region_and_cap():
    mean, std, m1, m2 = random()
    new_mean, new_std, _, _ = bgd_step(mean, std, 1e9 * m1, m2, max_mean_step=0.1, max_log_std_step=0.1)
    torch.testing.assert_close((new_mean - mean).abs(), 0.1 * std, rtol=1e-6, atol=1e-12)
    change = torch.log(new_std / std)
    free = -torch.asinh(std * m2 / 2)
    torch.testing.assert_close(change, free.clamp(-0.1, 0.1), rtol=1e-9, atol=1e-12)
    _, capped, _, _ = bgd_step(mean, std, m1, -m2.abs(), max_std=0.01)
    assert capped.max() <= 0.01


def test_what_is_not_learnt_stays():
    mean, std, m1, m2 = random()
    fixed_mean, moved_std, _, _ = bgd_step(mean, std, m1, m2, learn_mean=False)
    moved_mean, fixed_std, _, _ = bgd_step(mean, std, m1, m2, learn_std=False)
    assert torch.equal(fixed_mean, mean)
    assert torch.equal(fixed_std, std)
    assert not torch.equal(moved_mean, mean)
    assert not torch.equal(moved_std, std)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_statistics_leave_the_element_alone(bad, which):
    mean, std, m1, m2 = random(5)
    (m1, m2)[which][2] = bad
    new_mean, new_std, _, counters = bgd_step(mean, std, m1, m2, max_mean_step=0.1, max_log_std_step=0.1)
    assert new_mean[2] == mean[2]
    assert new_std[2] == std[2]
    assert (new_mean != mean).sum() == 4
    assert counters.tolist() == [1, 0, 1]
