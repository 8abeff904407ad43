"""Reparameterised weight samples, theta = mean + std * eps: reference implementation.

The samples of an antithetic pair are mirror images of each other at the mean. The CPU's vectorised kernels make the
second one so, theta' = 2 * mean - theta in float32: equal to mean - std * eps within the roundings of theta and theta'.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..calls import Draws, State
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


def normals(draws: Draws, i: int, like: Tensor) -> Tensor:
    """The normals of the draw that tensor ``i`` holds, in the type and shape of ``like``."""
    return _words_and_normals(draws, i, like)[1]


def sample(out: Sequence[Tensor], state: State, draws: Draws) -> None:
    """See `distruction.ops.sample`."""
    for i, (o, m, s) in enumerate(zip(out, state.mean, state.std, strict=True)):
        words, eps = _words_and_normals(draws, i, m)
        round_to(m + s * eps, o, words if draws.stochastic_rounding else None)


def _words_and_normals(draws: Draws, i: int, like: Tensor) -> tuple[Tensor, Tensor]:
    words, eps = words_and_normals(
        like.numel(),
        offset=draws.offsets[i],
        stream=draws.streams[i],
        seed=draws.seed,
        draw=draws.counters[0],
        antithetic=draws.antithetic,
        device=like.device,
    )
    return words, eps.to(like.dtype).view_as(like)
