"""The Gauss-Newton update of std; the formula is in `distruction.ops.reference.gauss_newton`.

Gradient, mean and std are read once, std and the next sample written once: 20 bytes per float32 parameter.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from distruction.ops.calls import Amp, Draws, State

from .approximate import reciprocal, square_root
from .multi_tensor import MEAN, PARAM, STD, STREAM, block_of, load, locate, pointer
from .philox import KEYS, words_and_normals
from .sample import rounded
from .tables import amp_scalars, drawing, finish, launches, mutated, on

_LARGEST = tl.constexpr(2.0**126)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=["counters", "grad_scale", "found_inf", "chunk", "root_evidence", *KEYS])
def gauss_newton_kernel(
    records,
    tensor_of_chunk,
    fresh,
    counters,
    grad_scale,
    found_inf,
    chunk,
    root_evidence,
    k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """One program's part of `gauss_newton`."""
    tensor, record, start, begin, end, group, group_high = locate(records, tensor_of_chunk, chunk, ALIGNED)
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0.0, end, 0)
        if ALIGNED:
            end = tl.multiple_of(end, 4)
    scale = root_evidence
    if grad_scale is not None:
        scale = root_evidence / tl.load(grad_scale)
    stream = tl.load(record + STREAM).to(tl.uint32)
    keys = (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19)
    draw = tl.load(counters)
    param_p = pointer(record + PARAM, start, PARAM_TYPE, ALIGNED)
    mean_p = pointer(record + MEAN, start, tl.float32, ALIGNED)
    std_p = pointer(record + STD, start, tl.float32, ALIGNED)
    grad_p = pointer(fresh + tensor, start, GRAD_TYPE, ALIGNED)
    refused = tl.zeros([BLOCK], tl.int32)
    for first in range(begin // BLOCK * BLOCK, end, BLOCK):
        i, inside = block_of(first, begin, end, BLOCK, ALIGNED)
        mean = load(mean_p + i, inside, ALIGNED)
        std = tl.load(std_p + i, inside, 0.0)  # another thread stores what would stand in
        grad = load(grad_p + i, inside, ALIGNED)
        t = tl.abs(grad * std * scale)
        # Beyond 2**63, where the square overflows, the hypotenuse is t.
        hypotenuse = tl.maximum(square_root(tl.minimum(tl.fma(t, t, 1.0), _LARGEST), TARGET), t)
        shrunk = tl.maximum(std * reciprocal(hypotenuse, TARGET), _SMALLEST_NORMAL)
        finite = t <= _LARGEST
        std = tl.where(finite, tl.minimum(shrunk, std), std)
        refused = tl.where(finite | (inside == 0), refused, 1)
        tl.store(std_p + i, std, inside)
        words, eps = words_and_normals(group, group_high, first, stream, draw + 1, keys, ANTITHETIC, BLOCK, TARGET)
        tl.store(param_p + i, rounded(tl.fma(std, eps, mean), words, PARAM_TYPE, STOCHASTIC, TARGET), inside)
    tl.store(counters + 2, 1, tl.max(refused, 0) != 0)


def gauss_newton(
    param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, root_evidence: float, amp: Amp
) -> None:
    """See `distruction.ops.gauss_newton`."""
    device = draws.counters.device
    with on(device):
        scalars = amp_scalars(amp, device)
        for launch, arguments in launches({**vars(state), "param": param}, [grad], draws):
            gauss_newton_kernel[(launch.chunks,)](
                root_evidence=root_evidence,
                PARAM_TYPE=launch.types[0],
                GRAD_TYPE=launch.types[1],
                **scalars,
                **drawing(draws),
                **arguments,
            )
        finish(draws.counters, scalars["found_inf"], None, None, advance=True, updated=True)
    mutated(param, state.std, [draws.counters])
