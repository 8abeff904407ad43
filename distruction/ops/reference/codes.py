"""Standard deviations from their 8-bit codes (`distruction.compression`): reference implementation.

    x' = low * 2**t,     t = code * (step * log2 e)

in float32 operations that every processor rounds in one way, none fused with another, so that a kernel reads the very
bits that `decode` restores: with k = floor(t) and f = t - k

    2**t = 2**k * (1 + f * (c1 + f * (c2 + f * (c3 + f * (c4 + f * c5)))))         relative error 2e-7

whose factor 2**k is added to the exponent. ``low`` is a normal number.
"""

import torch
from torch import Tensor

BLOCK = 1024
"""Elements that share ``low`` and ``step``, by their flat index in the whole parameter."""

LOG2_E = 1.4426950408889634
COEFFICIENTS = (
    0.6931512951850891,
    0.24016444385051727,
    0.05579991638660431,
    0.00901702418923378,
    0.0018671330763027072,
)


def decode(codes: Tensor, low: Tensor, step: Tensor, offset: int = 0) -> Tensor:
    """The float32 tensor of some codes.

    Args:
        codes: uint8, a parameter or a contiguous piece of one.
        low, step: float32, one for each block of the whole parameter.
        offset: flat index, in the whole parameter, of the first code.
    """
    flat = codes.reshape(-1)
    values = torch.empty(flat.numel(), dtype=torch.float32, device=codes.device)
    rates = step * LOG2_E
    head = min(-offset % BLOCK, flat.numel())
    whole = (flat.numel() - head) // BLOCK * BLOCK
    for begin, end, width in ((0, head, head), (head, head + whole, BLOCK), (head + whole, flat.numel(), BLOCK)):
        if begin < end:
            first, rows = (offset + begin) // BLOCK, max((end - begin) // BLOCK, 1)
            shape, here = (rows, min(width, end - begin)), slice(first, first + rows)
            _decode(flat[begin:end].view(shape), low[here, None], rates[here, None], values[begin:end].view(shape))
    return values.view(codes.shape)


def _decode(codes: Tensor, low: Tensor, rate: Tensor, out: Tensor) -> None:
    t = codes.float().mul_(rate)
    k = t.int()
    t.sub_(k)
    torch.mul(t, COEFFICIENTS[-1], out=out)
    for c in COEFFICIENTS[-2::-1]:
        out.add_(c).mul_(t)
    out.add_(1.0).mul_(low)
    out.view(torch.int32).add_(k.bitwise_left_shift_(23))
