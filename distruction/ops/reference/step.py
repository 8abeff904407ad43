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

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .kl import kl_terms
from .philox import words_and_normals
from .sample import sample


def shrink(std: Tensor, a: Tensor) -> Tensor:
    """std * exp(-asinh(a)), positive for every a: the larger root w = sqrt(1 + a**2) + |a| never cancels."""
    w = torch.sqrt(1.0 + a * a) + a.abs()
    return torch.where(a > 0, std / w, std * w)


def unscale(grad: Tensor, grad_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    grad = grad.to(dtype)
    return grad if grad_scale is None else grad / grad_scale.to(dtype)


def accumulate(
    param: Sequence[Tensor],
    m1: Sequence[Tensor],
    m2: Sequence[Tensor],
    grad: Sequence[Tensor],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    offsets: Sequence[int],
    streams: Sequence[int],
    seed: int,
    counters: Tensor,
    antithetic: bool,
    stochastic_rounding: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See `distruction.ops.accumulate`."""
    if found_inf is not None and found_inf.item() != 0:
        return
    first = torch.tensor(not m2, device=counters.device) | (counters[1] == 0)
    for i, (a1, g, m, offset, stream) in enumerate(zip(m1, grad, mean, offsets, streams, strict=True)):
        g = unscale(g, grad_scale, m.dtype)
        a1.copy_(torch.where(first, g, a1 + g))
        if not m2:
            continue
        _, eps = words_and_normals(
            m.numel(),
            offset=offset,
            stream=stream,
            seed=seed,
            draw=counters[0],
            antithetic=antithetic,
            device=m.device,
        )
        g_eps = g * eps.to(m.dtype).view_as(m)
        m2[i].copy_(torch.where(first, g_eps, m2[i] + g_eps))
    counters[:2] += 1
    sample(param, mean, std, offsets, streams, seed, counters, antithetic, stochastic_rounding)


def step(
    param: Sequence[Tensor],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    grad: Sequence[Tensor],
    m1: Sequence[Tensor],
    m2: Sequence[Tensor],
    prior_mean: Sequence[Tensor],
    prior_std: Sequence[Tensor],
    lr: Tensor,
    kl_weight: Tensor,
    loss_scale: float,
    offsets: Sequence[int],
    streams: Sequence[int],
    seed: int,
    counters: Tensor,
    antithetic: bool,
    stochastic_rounding: bool,
    max_mean_step: float,
    max_log_std_step: float,
    max_std: float,
    learn_mean: bool,
    learn_std: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """See `distruction.ops.step`."""
    total = torch.zeros((), dtype=torch.float64, device=counters.device)
    skip = found_inf is not None and found_inf.item() != 0
    max_a = math.sinh(max_log_std_step) if max_log_std_step < 700 else math.inf
    for i, (m, s) in enumerate(zip(mean, std, strict=True)):
        prior = (prior_mean[i], prior_std[i]) if prior_mean else None
        if not skip:
            _update_tensor(
                m,
                s,
                unscale(grad[i], grad_scale, m.dtype),
                m1[i] if m1 else None,
                m2[i] if m2 else None,
                prior,
                lr=lr.to(m.dtype),
                kl_weight=kl_weight.to(m.dtype),
                loss_scale=loss_scale,
                offset=offsets[i],
                stream=streams[i],
                seed=seed,
                counters=counters,
                antithetic=antithetic,
                max_mean_step=max_mean_step,
                max_a=max_a,
                max_std=max_std,
                learn_mean=learn_mean,
                learn_std=learn_std,
            )
        if prior is not None:
            total += kl_terms(m, s, *prior)[0].sum(dtype=torch.float64)
    if not skip:
        counters[0] += 1
        counters[1] = 0
        sample(param, mean, std, offsets, streams, seed, counters, antithetic, stochastic_rounding)
    return total


def _update_tensor(
    mean: Tensor,
    std: Tensor,
    grad: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    prior: tuple[Tensor, Tensor] | None,
    *,
    lr: Tensor,
    kl_weight: Tensor,
    loss_scale: float,
    offset: int,
    stream: int,
    seed: int,
    counters: Tensor,
    antithetic: bool,
    max_mean_step: float,
    max_a: float,
    max_std: float,
    learn_mean: bool,
    learn_std: bool,
) -> None:
    _, eps = words_and_normals(
        mean.numel(),
        offset=offset,
        stream=stream,
        seed=seed,
        draw=counters[0],
        antithetic=antithetic,
        device=mean.device,
    )
    eps = eps.to(mean.dtype).view_as(mean)
    s1, s2 = grad, grad * eps
    if m1 is not None:
        samples = (counters[1] + 1).to(mean.dtype)
        s2 = (grad - m1) * eps if m2 is None else s2 + m2
        s1, s2 = (s1 + m1) / samples, s2 / samples
    s1, s2 = s1 * loss_scale, s2 * loss_scale
    if prior is None:
        a = 0.5 * std * s2
    else:
        s1, s2 = (1.0 - kl_weight) * s1, (1.0 - kl_weight) * s2
        d = (std - prior[1]) / prior[1]
        a = 0.5 * (std * s2 + kl_weight * d * (2.0 + d))
    bound = max_mean_step * std
    new_mean = mean - torch.clamp(lr * std * std * s1, -bound, bound)
    if prior is not None:
        v = lr * kl_weight * (std / prior[1]) ** 2
        # From the nearer end: the other one's digits would cancel.
        distance, share = prior[0] - new_mean, 1.0 / (1.0 + v)
        new_mean = torch.where(v < 1.0, new_mean + v * share * distance, prior[0] - share * distance)
    new_std = shrink(std, a.clamp(-max_a, max_a)).clamp(max=max_std)
    finite = s1.isfinite() & s2.isfinite() & new_mean.isfinite() & new_std.isfinite() & (new_std > 0)
    if learn_mean:
        mean.copy_(torch.where(finite, new_mean, mean))
    if learn_std:
        std.copy_(torch.where(finite, new_std, std))
    counters[2] |= ~finite.all()
