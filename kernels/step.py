"""Monte Carlo statistics and the fused BGD step; the formulas are in `distruction.ops.reference.step`.

Each array is read and written once. The old draw is regenerated, the next one made in the same pass.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from distruction.ops.calls import Amp, Draws, Rule, State

from .approximate import inverse, reciprocal, square_root
from .codes import decode, ranges
from .kl import twice_kl
from .multi_tensor import (
    M1,
    M2,
    MEAN,
    PARAM,
    PRIOR_CODES,
    PRIOR_LOW,
    PRIOR_MEAN,
    PRIOR_STD,
    PRIOR_STEP,
    STD,
    STREAM,
    block_of,
    load,
    locate,
    pointer,
    sum_of_groups,
)
from .philox import KEYS, words_and_normals
from .sample import rounded
from .tables import amp_scalars, drawing, finish, launches, mutated, on, scalar, sums_of_kl


@triton.jit(do_not_specialize=["counters", "grad_scale", "found_inf", "chunk", *KEYS])
def accumulate_kernel(
    records,
    tensor_of_chunk,
    fresh,
    counters,
    grad_scale,
    found_inf,
    chunk,
    k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STATISTICS: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """STATISTICS: the arrays that are kept: 1, the first gradient of a pair, or 2, the sums of g and g * eps."""
    tensor, record, start, begin, end, group, group_high = locate(records, tensor_of_chunk, chunk, ALIGNED)
    if found_inf is not None:
        end = tl.where(tl.load(found_inf) == 0.0, end, 0)
    inverse_scale = 1.0
    if grad_scale is not None:
        inverse_scale = inverse(tl.load(grad_scale), TARGET)
    stream = tl.load(record + STREAM).to(tl.uint32)
    keys = (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19)
    draw = tl.load(counters)
    param_p = pointer(record + PARAM, start, PARAM_TYPE, ALIGNED)
    mean_p = pointer(record + MEAN, start, tl.float32, ALIGNED)
    std_p = pointer(record + STD, start, tl.float32, ALIGNED)
    m1_p = pointer(record + M1, start, tl.float32, ALIGNED)
    if STATISTICS == 2:
        m2_p = pointer(record + M2, start, tl.float32, ALIGNED)
        adds = tl.load(counters + 1) != 0  # an update's first sample overwrites
    grad_p = pointer(fresh + tensor, start, GRAD_TYPE, ALIGNED)
    for first in range(begin // BLOCK * BLOCK, end, BLOCK):
        i, inside = block_of(first, begin, end, BLOCK, ALIGNED)
        grad = load(grad_p + i, inside, ALIGNED) * inverse_scale
        if STATISTICS == 2:
            m1 = tl.load(m1_p + i, inside & adds, 0.0)
            m2 = tl.load(m2_p + i, inside & adds, 0.0)
            _, eps = words_and_normals(group, group_high, first, stream, draw, keys, ANTITHETIC, BLOCK, TARGET)
            tl.store(m1_p + i, m1 + grad, inside)
            tl.store(m2_p + i, tl.fma(grad, eps, m2), inside)
        else:
            tl.store(m1_p + i, grad, inside)
        mean = load(mean_p + i, inside, ALIGNED)
        std = load(std_p + i, inside, ALIGNED)
        words, eps = words_and_normals(group, group_high, first, stream, draw + 1, keys, ANTITHETIC, BLOCK, TARGET)
        theta = tl.fma(std, eps, mean)
        tl.store(param_p + i, rounded(theta, words, PARAM_TYPE, STOCHASTIC, TARGET), inside)


@triton.jit(
    do_not_specialize=["counters", "lr", "kl_weight", "grad_scale", "found_inf", "partial", "chunk", *KEYS],
)
def step_kernel(
    records,
    tensor_of_chunk,
    fresh,
    counters,
    lr,
    kl_weight,
    grad_scale,
    found_inf,
    partial,
    chunk,
    k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19,
    loss_scale,
    max_mean_step,
    max_a,
    max_std,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRIOR: tl.constexpr,
    PRIOR_TYPE: tl.constexpr,
    STATISTICS: tl.constexpr,
    BOUNDED: tl.constexpr,
    LEARN_MEAN: tl.constexpr,
    LEARN_STD: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """The update, the KL's partial sum and the next sample.

    PRIOR: how it is kept: there is none, 1 by means and stds, 2 by means of PRIOR_TYPE and codes.
    STATISTICS: arrays that earlier samples left: none, the first gradient of a pair, or two sums.
    BOUNDED: the bounds are finite and |change of log std| is at most 1, which saves operations.
    """
    tensor, record, start, begin, end, group, group_high = locate(records, tensor_of_chunk, chunk, ALIGNED)
    if found_inf is not None:
        # Where the elements that are updated end: all of them or none.
        proceed = tl.load(found_inf) == 0.0
        updated_end = tl.where(proceed, end, 0)
        if ALIGNED:
            updated_end = tl.multiple_of(updated_end, 4)
        # No std is below it, so that none is accepted.
        max_std = tl.where(proceed, max_std, float("-inf"))
    stream = tl.load(record + STREAM).to(tl.uint32)
    keys = (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19)
    draw = tl.load(counters)
    rate = tl.load(lr)
    weight = 0.0
    # Half of what multiplies the statistics; the other half is in the mean's rate.
    scale = loss_scale * 0.5
    if PRIOR:
        weight = tl.load(kl_weight)
        scale = scale * (1.0 - weight)
    half_weight = 0.5 * weight
    inverse_scale = 1.0
    if grad_scale is not None:
        inverse_scale = inverse(tl.load(grad_scale), TARGET)
    scale = scale / (tl.load(counters + 1) + 1).to(tl.float32) if STATISTICS else scale * inverse_scale
    param_p = pointer(record + PARAM, start, PARAM_TYPE, ALIGNED)
    mean_p = pointer(record + MEAN, start, tl.float32, ALIGNED)
    std_p = pointer(record + STD, start, tl.float32, ALIGNED)
    grad_p = pointer(fresh + tensor, start, GRAD_TYPE, ALIGNED)
    if STATISTICS:
        m1_p = pointer(record + M1, start, tl.float32, ALIGNED)
    if STATISTICS == 2:
        m2_p = pointer(record + M2, start, tl.float32, ALIGNED)
    if PRIOR:
        prior_mean_p = pointer(record + PRIOR_MEAN, start, PRIOR_TYPE, ALIGNED)
    if PRIOR == 1:
        prior_std_p = pointer(record + PRIOR_STD, start, tl.float32, ALIGNED)
    if PRIOR == 2:
        codes_p = pointer(record + PRIOR_CODES, start, tl.uint8, ALIGNED)
        low_p = tl.load(record + PRIOR_LOW).to(tl.pointer_type(tl.float32))
        step_p = tl.load(record + PRIOR_STEP).to(tl.pointer_type(tl.float32))
    kl = tl.zeros([BLOCK // 4], tl.float64)
    refused = tl.zeros([BLOCK], tl.int32)
    for first in range(begin // BLOCK * BLOCK, end, BLOCK):
        i, inside = block_of(first, begin, end, BLOCK, ALIGNED)
        stored = inside
        if found_inf is not None:
            stored = first + tl.arange(0, BLOCK) < updated_end
            if not ALIGNED:
                stored = stored & inside
        # Another thread stores what would stand in.
        mean = tl.load(mean_p + i, inside, 0.0)
        std = tl.load(std_p + i, inside, 0.0)
        grad = load(grad_p + i, inside, ALIGNED)
        _, eps = words_and_normals(group, group_high, first, stream, draw, keys, ANTITHETIC, BLOCK, TARGET)
        if STATISTICS:
            grad = grad * inverse_scale
            m1 = load(m1_p + i, inside, ALIGNED)
            s1 = (m1 + grad) * scale
            if STATISTICS == 2:
                s2 = tl.fma(grad, eps, load(m2_p + i, inside, ALIGNED)) * scale
            else:
                s2 = (grad - m1) * scale * eps
        else:
            s1 = grad * scale
            s2 = s1 * eps
        # Every clamp keeps a NaN, so that it is found below.
        in_stds = tl.clamp(std * (2.0 * rate) * s1, -max_mean_step, max_mean_step, tl.PropagateNan.ALL)
        new_mean = tl.fma(-in_stds, std, mean)
        if PRIOR:
            prior_mean = load(prior_mean_p + i, inside, ALIGNED)
            if PRIOR == 2:
                low, prior_rate = ranges(low_p, step_p, group, group_high, first, end, BLOCK)
                prior_std = decode(load(codes_p + i, inside, ALIGNED), low, prior_rate)
            else:
                prior_std = load(prior_std_p + i, inside, ALIGNED)
            inverse_prior = reciprocal(prior_std, TARGET)
            ratio = std * inverse_prior
            ratio2 = ratio * ratio
            a = tl.fma(s2, std, tl.fma(ratio2, half_weight, -half_weight))
            v = ratio2 * (rate * weight)
            share = reciprocal(1.0 + v, TARGET)
            # From the nearer end, or the digits of a prior that is much nearer to zero than the mean cancel.
            nearer = tl.where(v < 1.0, new_mean, prior_mean)
            share = tl.where(v < 1.0, v, -1.0) * share
            new_mean = tl.fma(share, prior_mean - new_mean, nearer)
        else:
            a = s2 * std
        a = tl.clamp(a, -max_a, max_a, tl.PropagateNan.ALL)
        root = square_root(tl.fma(a, a, 1.0), TARGET)
        if BOUNDED:
            new_std = tl.minimum(std * (root - a), max_std, tl.PropagateNan.ALL)
            positive = new_std > 0
        else:
            # The larger root never cancels, so std stays positive for every a.
            larger = root + tl.abs(a)
            new_std = std * tl.where(a > 0, reciprocal(larger, TARGET), larger)
            new_std = tl.minimum(new_std, max_std, tl.PropagateNan.ALL)
            # 0 < new_std < infinity as one comparison of integers.
            positive = new_std.to(tl.uint32, bitcast=True) - 1 < 0x7F7FFFFF
        finite = (tl.abs(s2) < float("inf")) & (tl.abs(new_mean) < float("inf")) & positive
        if STATISTICS:
            finite = finite & (tl.abs(s1) < float("inf"))
        refused |= tl.where(finite, 0, inside.to(tl.int32))
        if LEARN_MEAN:
            mean = tl.where(finite, new_mean, mean)
            tl.store(mean_p + i, mean, stored)
        if LEARN_STD:
            std = tl.where(finite, new_std, std)
            tl.store(std_p + i, std, stored)
        words, eps = words_and_normals(group, group_high, first, stream, draw + 1, keys, ANTITHETIC, BLOCK, TARGET)
        theta = tl.fma(std, eps, mean)
        tl.store(param_p + i, rounded(theta, words, PARAM_TYPE, STOCHASTIC, TARGET), stored)
        if PRIOR:
            dm = (mean - prior_mean) * inverse_prior
            value = twice_kl(dm, (std - prior_std) * inverse_prior, std * inverse_prior, TARGET)
            kl += sum_of_groups(value, first, inside, end, BLOCK, ALIGNED)
    if PRIOR:
        tl.store(partial + tl.program_id(0), tl.sum(kl, 0) * 0.5)
    refuse = tl.max(refused, 0) != 0
    if found_inf is not None:
        refuse = refuse & proceed
    tl.store(counters + 2, 1, refuse)


def accumulate(param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, amp: Amp) -> None:
    """See `distruction.ops.accumulate`."""
    device = draws.counters.device
    with on(device):
        scalars = amp_scalars(amp, device)
        for launch, arguments in launches({**vars(state), "param": param}, [grad], draws):
            accumulate_kernel[(launch.chunks,)](
                PARAM_TYPE=launch.types[0],
                GRAD_TYPE=launch.types[1],
                STATISTICS=2 if state.m2 else 1,
                **scalars,
                **drawing(draws),
                **arguments,
            )
        finish(draws.counters, scalars["found_inf"], None, None, advance=True)
    mutated(param, state.m1, state.m2, [draws.counters])


def step(param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, rule: Rule, amp: Amp) -> Tensor:
    """See `distruction.ops.step`."""
    device = draws.counters.device
    with on(device):
        scalars = amp_scalars(amp, device)
        options = {
            "lr": scalar(rule.lr, device),
            "kl_weight": scalar(rule.kl_weight, device),
            "loss_scale": float(rule.loss_scale),
            "max_mean_step": float(rule.max_mean_step),
            "max_a": rule.max_a,
            "max_std": float(rule.max_std),
            "PRIOR": 2 if state.prior_codes else 1 if state.prior_mean else 0,
            "STATISTICS": 2 if state.m2 else 1 if state.m1 else 0,
            "BOUNDED": rule.max_log_std_step <= 1 and max(rule.max_mean_step, rule.max_std) < math.inf,
            "LEARN_MEAN": rule.learn_mean,
            "LEARN_STD": rule.learn_std,
        }
        planned = launches({**vars(state), "param": param}, [grad], draws)
        partial, total = sums_of_kl(planned, device, bool(state.prior_mean))
        first = 0
        for launch, arguments in planned:
            step_kernel[(launch.chunks,)](
                partial=None if partial is None else partial[first:],
                PARAM_TYPE=launch.types[0],
                GRAD_TYPE=launch.types[1],
                PRIOR_TYPE=launch.types[2],
                **options,
                **scalars,
                **drawing(draws),
                **arguments,
            )
            first += launch.chunks
        finish(draws.counters, scalars["found_inf"], partial, total, advance=True, updated=True)
    mutated(param, state.mean, state.std, [draws.counters])
    return total
