"""Monte Carlo statistics and the BGD update: reference implementation.

Bayesian Gradient Descent (Zeno, Golan, Hoffer, Soudry, "Task Agnostic Continual Learning Using Online
Variational Bayes", arXiv 1803.10123). With g the gradient at the sample mean + std * eps, averages over K
samples, and a loss that is a sum over the data:

    mean <- mean - lr * std**2 * E[g]
    std  <- std * sqrt(1 + a**2) - std * a,     a = std * E[g * eps] / 2

that is, log std <- log std - asinh(a). (The DiStruction paper's Eq. (1) misprints the second line: its last
term stands inside the root and its square inside the expectation, so that the radicand may be negative.)

With a prior N(mean_p, std_p**2) and KL weight w the objective is (1 - w) * loss + w * KL(q || prior):

    a    <- std * (1 - w) * E[g * eps] / 2 + w * ((std / std_p)**2 - 1) / 2
    mean <- (mean - step + v * mean_p) / (1 + v),   step = lr * (1 - w) * std**2 * E[g],
                                                    v    = lr * w * (std / std_p)**2

The pull on the mean is implicit, hence stable for every w. The trust region bounds a to
+-sinh(max_log_std_step) and the step to +-max_mean_step * std; infinity switches a bound off.

Of an antithetic pair, whose draws are -eps and eps, the first gradient g' alone is kept: with g the second one

    E[g] = (g + g') / 2,     E[g * eps] = eps * (g - g') / 2
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..calls import Amp, Draws, Rule, State
from .kl import kl_terms
from .sample import normals, sample


def shrink(std: Tensor, a: Tensor) -> Tensor:
    """std * exp(-asinh(a)), positive for every a: the larger root w = sqrt(1 + a**2) + |a| never cancels."""
    w = torch.sqrt(1.0 + a * a) + a.abs()
    return torch.where(a > 0, std / w, std * w)


def unscale(grad: Tensor, amp: Amp, dtype: torch.dtype) -> Tensor:
    """The gradient in the state's type, without GradScaler's scale."""
    grad = grad.to(dtype)
    return grad if amp.grad_scale is None else grad / amp.grad_scale.to(dtype)


def advance(counters: Tensor) -> None:
    """Count the draw that an update ends with."""
    counters[0] += 1
    counters[1] = 0


def accumulate(param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, amp: Amp) -> None:
    """See `distruction.ops.accumulate`."""
    if amp.refuses():
        return
    first = torch.tensor(not state.m2, device=draws.counters.device) | (draws.counters[1] == 0)
    for i, (m1, g, m) in enumerate(zip(state.m1, grad, state.mean, strict=True)):
        g = unscale(g, amp, m.dtype)
        m1.copy_(torch.where(first, g, m1 + g))
        if state.m2:
            g_eps = g * normals(draws, i, m)
            state.m2[i].copy_(torch.where(first, g_eps, state.m2[i] + g_eps))
    draws.counters[:2] += 1
    sample(param, state, draws)


def step(param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, rule: Rule, amp: Amp) -> Tensor:
    """See `distruction.ops.step`."""
    total = torch.zeros((), dtype=torch.float64, device=draws.counters.device)
    skip = amp.refuses()
    for i, (m, s) in enumerate(zip(state.mean, state.std, strict=True)):
        if not skip:
            _update(i, unscale(grad[i], amp, m.dtype), state, draws, rule)
        if state.prior_mean:
            total += kl_terms(m, s, state.prior_mean[i], state.prior_std[i])[0].sum(dtype=torch.float64)
    if not skip:
        advance(draws.counters)
        sample(param, state, draws)
    return total


def _update(i: int, grad: Tensor, state: State, draws: Draws, rule: Rule) -> None:
    """Update the mean and std of tensor ``i``."""
    mean, std = state.mean[i], state.std[i]
    lr, kl_weight = rule.lr.to(mean.dtype), rule.kl_weight.to(mean.dtype)
    eps = normals(draws, i, mean)
    s1, s2 = grad, grad * eps
    if state.m1:
        m1, samples = state.m1[i], (draws.counters[1] + 1).to(mean.dtype)
        s2 = s2 + state.m2[i] if state.m2 else (grad - m1) * eps
        s1, s2 = (s1 + m1) / samples, s2 / samples
    s1, s2 = s1 * rule.loss_scale, s2 * rule.loss_scale
    if not state.prior_mean:
        a = 0.5 * std * s2
    else:
        prior_mean, prior_std = state.prior_mean[i], state.prior_std[i]
        s1, s2 = (1.0 - kl_weight) * s1, (1.0 - kl_weight) * s2
        d = (std - prior_std) / prior_std
        a = 0.5 * (std * s2 + kl_weight * d * (2.0 + d))
    bound = rule.max_mean_step * std
    new_mean = mean - torch.clamp(lr * std * std * s1, -bound, bound)
    if state.prior_mean:
        v = lr * kl_weight * (std / prior_std) ** 2
        # From the nearer end: the other one's digits would cancel.
        distance, share = prior_mean - new_mean, 1.0 / (1.0 + v)
        new_mean = torch.where(v < 1.0, new_mean + v * share * distance, prior_mean - share * distance)
    new_std = shrink(std, a.clamp(-rule.max_a, rule.max_a)).clamp(max=rule.max_std)
    finite = s1.isfinite() & s2.isfinite() & new_mean.isfinite() & new_std.isfinite() & (new_std > 0)
    if rule.learn_mean:
        mean.copy_(torch.where(finite, new_mean, mean))
    if rule.learn_std:
        std.copy_(torch.where(finite, new_std, std))
    draws.counters[2] |= ~finite.all()
