"""KL divergence between diagonal Gaussians with both gradients: reference implementation.

Per parameter, with dm = (mean - mean_p) / std_p and d = (std - std_p) / std_p:

    KL        = dm**2 / 2 + d**2 / 2 + (d - log(1 + d))
    dKL/dmean = dm / std_p
    dKL/dstd  = d * (2 + d) / std            ( = std / std_p**2 - 1 / std )

This is the paper's KL in terms of differences, which keep their digits as q tends to p; the paper's
dKL/dmean has the wrong sign.
"""

import torch
from torch import Tensor

from ..calls import State


def d_minus_log1p(d: Tensor, ratio: Tensor) -> Tensor:
    """d - log(ratio) for ratio = 1 + d > 0 without cancellation.

    Near zero, s = d / (2 + d) gives d - 2 atanh(s) = d*s - 2*s**3 * (1/3 + s**2/5 + s**4/7 + ...).
    """
    s = d / (2.0 + d)
    s2 = s * s
    series = torch.zeros_like(s)
    for k in range(25 if d.dtype == torch.float64 else 13, 1, -2):
        series = series * s2 + 1.0 / k
    return torch.where(d.abs() < 0.33, d * s - 2.0 * s * s2 * series, d - torch.log(ratio))


def kl_terms(mean: Tensor, std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The KL of each parameter, ``(mean - mean_p) / std_p`` and ``(std - std_p) / std_p``."""
    dm = (mean - prior_mean) / prior_std
    d = (std - prior_std) / prior_std
    return 0.5 * dm * dm + (0.5 * d * d + d_minus_log1p(d, std / prior_std)), dm, d


def gaussian_kl(state: State) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See `distruction.ops.gaussian_kl`."""
    total = torch.zeros((), dtype=torch.float64, device=state.mean[0].device if state.mean else None)
    grad_mean, grad_std = [], []
    for m, s, pm, ps in zip(state.mean, state.std, state.prior_mean, state.prior_std, strict=True):
        kl, dm, d = kl_terms(m, s, pm, ps)
        total += kl.sum(dtype=torch.float64)
        grad_mean.append(dm / ps)
        grad_std.append(d * (2.0 + d) / s)
    return total, grad_mean, grad_std
