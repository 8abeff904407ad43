"""``BGD(at_means=True)``: gradients at the means, stds kept, against the closed form in float64."""

import pytest
import torch
from torch import nn

from distruction import BGD, Posterior, UsageError


def test_a_step_is_the_closed_form_and_nothing_is_sampled():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    prior = Posterior.around(model, {n: torch.rand_like(p) * 0.1 + 0.05 for n, p in model.named_parameters()})
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = BGD(
        model.named_parameters(), lr=0.5, std_init=prior, prior=prior, kl_weight=0.2, data_per_step=7.0,
        learn_std=False, at_means=True, max_mean_step=float("inf"),
    )  # fmt: skip
    x = torch.randn(5, 3)
    expected = {n: p.double() for n, p in start.items()}
    opt.train()
    for _ in range(2):
        assert all(torch.equal(p, opt.posterior().means[n]) for n, p in model.named_parameters())
        opt.zero_grad()
        model(x).square().mean().backward()
        for n, p in model.named_parameters():
            std = prior.stds[n].double()
            step = 0.5 * 0.8 * 7.0 * std**2 * p.grad.double()
            v = 0.5 * 0.2  # of std = the prior's
            expected[n] = (expected[n] - step + v * start[n].double()) / (1 + v)
        opt.step()
    opt.eval()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[n], rtol=1e-5, atol=1e-6)
        assert torch.equal(opt.posterior().stds[n], prior.stds[n])


@pytest.mark.parametrize("options", [{"learn_std": True}, {"mc_samples": 2, "learn_std": False}])
def test_what_does_not_go_with_it(options):
    with pytest.raises(UsageError, match="at_means needs"):
        BGD(nn.Linear(2, 1).parameters(), at_means=True, **options)
