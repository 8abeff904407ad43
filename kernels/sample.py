"""Reparameterised weight samples, theta = mean + std * eps."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from distruction.ops.calls import Draws, State

from .multi_tensor import MEAN, PARAM, STD, STREAM, block_of, load, locate, pointer
from .philox import KEYS, words_and_normals
from .tables import drawing, launches, mutated, on


@triton.jit
def rounded(theta, words, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr, TARGET: tl.constexpr):
    """theta in the parameter's type; stochastic rounding adds 16 random bits below bfloat16's last place."""
    if TYPE == tl.bfloat16 and (STOCHASTIC or TARGET == "interpreter"):  # noqa: SIM300
        bits = theta.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            # The sum of a NaN could be infinity or, past the last word, zero.
            bits = tl.where(theta == theta, bits + (words & 0xFFFF), 0x7FC00000)
        else:
            # To nearest even: the interpreter's own conversion truncates.
            bits = tl.where(theta == theta, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return theta.to(TYPE)


@triton.jit(do_not_specialize=["counters", "chunk", *KEYS])
def sample_kernel(
    records,
    tensor_of_chunk,
    counters,
    chunk,
    k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19,
    PARAM_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """One program's part of `sample`."""
    _, record, start, begin, end, group, group_high = locate(records, tensor_of_chunk, chunk, ALIGNED)
    stream = tl.load(record + STREAM).to(tl.uint32)
    keys = (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19)
    draw = tl.load(counters)
    param_p = pointer(record + PARAM, start, PARAM_TYPE, ALIGNED)
    mean_p = pointer(record + MEAN, start, tl.float32, ALIGNED)
    std_p = pointer(record + STD, start, tl.float32, ALIGNED)
    for first in range(begin // BLOCK * BLOCK, end, BLOCK):
        i, inside = block_of(first, begin, end, BLOCK, ALIGNED)
        mean = load(mean_p + i, inside, ALIGNED)
        std = load(std_p + i, inside, ALIGNED)
        words, eps = words_and_normals(group, group_high, first, stream, draw, keys, ANTITHETIC, BLOCK, TARGET)
        tl.store(param_p + i, rounded(tl.fma(std, eps, mean), words, PARAM_TYPE, STOCHASTIC, TARGET), inside)


def sample(out: Sequence[Tensor], state: State, draws: Draws) -> None:
    """See `distruction.ops.sample`."""
    with on(draws.counters.device):
        for launch, arguments in launches({**vars(state), "param": out}, [], draws):
            arguments.pop("fresh")
            sample_kernel[(launch.chunks,)](PARAM_TYPE=launch.types[0], **drawing(draws), **arguments)
    mutated(out)
