"""The Gauss-Newton update of std: reference implementation.

Variational online Gauss-Newton (Khan, Nielsen, Tangkaratt, Lin, Gal, Srivastava, "Fast and Scalable Bayesian Deep
Learning by Weight-Perturbation in Adam", arXiv 1806.04854) with the mean fixed. With g the gradient at the sample
mean + std * eps, whose square has the diagonal of the generalized Gauss-Newton matrix as its mean:

    1 / std**2 <- 1 / std**2 + evidence * g**2

that is, with t = |g| * std * sqrt(evidence):

    std <- std / sqrt(1 + t**2)

The mean does not enter the statistic, nor does eps: no old draw is regenerated. The root is that of a hypotenuse,
which does not overflow with t**2. A change of less than the rounding of std, 6e-8 of it in float32, is lost.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..calls import Amp, Draws, State
from .sample import sample
from .step import advance, unscale

LARGEST = 2.0**126
"""The largest t: its reciprocal is the smallest normal float32 number, which is also the smallest std."""


def gauss_newton(
    param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, root_evidence: float, amp: Amp
) -> None:
    """See `distruction.ops.gauss_newton`."""
    if amp.refuses():
        return
    for s, g in zip(state.std, grad, strict=True):
        t = (unscale(g, amp, s.dtype) * s * root_evidence).abs()
        finite = t <= LARGEST
        shrunk = (s / torch.hypot(t, torch.ones_like(t))).clamp(min=1.0 / LARGEST)
        s.copy_(torch.where(finite, torch.minimum(shrunk, s), s))
        draws.counters[2] |= ~finite.all()
    advance(draws.counters)
    sample(param, state, draws)
