"""Gaussian KL against ``torch.distributions`` and autograd."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import distruction
from distruction import ops


def gaussians(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    mean, prior_mean = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    std, prior_std = (10 ** (3 * torch.rand(n, generator=g, dtype=torch.float64) - 2) for _ in range(2))
    return mean, std, prior_mean, prior_std


def naive(mean, std, prior_mean, prior_std):
    return kl_divergence(Normal(mean, std), Normal(prior_mean, prior_std))


def test_value_and_gradients_in_float64():
    mean, std, prior_mean, prior_std = gaussians(1000)
    mean.requires_grad_()
    std.requires_grad_()
    expected = naive(mean, std, prior_mean, prior_std).sum()
    wanted = torch.autograd.grad(expected, (mean, std))
    total, (d_mean,), (d_std,) = ops.gaussian_kl([mean], [std], [prior_mean], [prior_std], backend="reference")
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(d_mean, wanted[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(d_std, wanted[1], rtol=1e-11, atol=1e-11)


def test_gradcheck():
    mean, std, prior_mean, prior_std = (t.requires_grad_(i < 2) for i, t in enumerate(gaussians(5)))
    loss = lambda m, s: distruction.gaussian_kl(m, s, prior_mean, prior_std, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(loss, (mean, std))


def test_gradient_of_a_loss_that_is_not_the_last_op():
    mean, std, prior_mean, prior_std = (t.float().requires_grad_(i < 2) for i, t in enumerate(gaussians(7)))
    (3.5 * distruction.gaussian_kl(mean, std, prior_mean, prior_std)).backward()
    wanted = torch.autograd.grad(3.5 * naive(mean.double(), std.double(), prior_mean, prior_std).sum(), (mean, std))
    torch.testing.assert_close(mean.grad, wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(std.grad, wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("log_ratio", [-3, -1, -1e-2, -1e-4, -1e-6, 1e-6, 1e-4, 1e-2, 1, 3])
def test_float32_keeps_its_digits_near_the_prior(log_ratio):
    prior_std = torch.full((1,), 0.05)
    std = (prior_std.double() * 10**log_ratio).float()
    mean = torch.full((1,), 0.3)
    value = ops.gaussian_kl([mean], [std], [mean], [prior_std], backend="reference")[0]
    r = (std.double() / prior_std.double()) ** 2
    # log1p keeps the digits of float64 where r - 1 - log(r) loses them.
    expected = 0.5 * ((r - 1) - torch.log1p(r - 1)) if abs(log_ratio) > 1e-3 else (r - 1) ** 2 / 4 - (r - 1) ** 3 / 6
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_zero_at_the_prior():
    mean, std, _, _ = (t.float() for t in gaussians(100))
    total, d_mean, d_std = ops.gaussian_kl([mean], [std], [mean], [std], backend="reference")
    assert total == 0
    assert not d_mean[0].any()
    assert not d_std[0].any()


def test_opcheck():
    args = [[t.float().requires_grad_(i < 2)] for i, t in enumerate(gaussians(9))]
    torch.library.opcheck(torch.ops.distruction.gaussian_kl.default, tuple(args))


def test_loss_module_over_names():
    mean, std, prior_mean, prior_std = (t.float() for t in gaussians(6))
    prior = distruction.Posterior({"b": prior_mean[:2], "a": prior_mean[2:]}, {"b": prior_std[:2], "a": prior_std[2:]})
    value = distruction.GaussianKL(prior, kl_weight=0.25)({"a": mean[2:], "b": mean[:2]}, {"a": std[2:], "b": std[:2]})
    expected = 0.25 * naive(*(t.double() for t in (mean, std, prior_mean, prior_std))).sum()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
