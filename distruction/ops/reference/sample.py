"""Reparameterised weight samples, theta = mean + std * eps: reference implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import words_and_normals


def round_to(value: Tensor, out: Tensor, words: Tensor | None) -> None:
    """Store ``value`` in ``out``'s dtype; given random words, a bfloat16 store rounds stochastically.

    Stochastic rounding adds the low 16 bits of each element's word below bfloat16's last place and
    truncates, so that the expected stored value is ``value``. A NaN stays one.
    """
    if words is not None and out.dtype == torch.bfloat16:
        bits = value.float().view(torch.int32)
        rounded = ((bits + (words.reshape(value.shape) & 0xFFFF).int()) & -0x10000).view(torch.float32)
        value = torch.where(value.isnan(), value, rounded)
    out.copy_(value)


def sample(
    out: Sequence[Tensor],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    offsets: Sequence[int],
    streams: Sequence[int],
    seed: int,
    counters: Tensor,
    antithetic: bool,
    stochastic_rounding: bool,
) -> None:
    """See `distruction.ops.sample`."""
    for o, m, s, offset, stream in zip(out, mean, std, offsets, streams, strict=True):
        words, eps = words_and_normals(
            m.numel(),
            offset=offset,
            stream=stream,
            seed=seed,
            draw=counters[0],
            antithetic=antithetic,
            device=m.device,
        )
        theta = m + s * eps.to(m.dtype).view_as(m)
        round_to(theta, o, words if stochastic_rounding else None)
