"""The ops of the library, registered with PyTorch as ``torch.ops.distruction.*``.

Each op takes lists of tensors, a whole model per call, mutates what its schema marks, and is served by the
backend that `distruction.ops.backends` names for the device, or by the one passed as ``backend``.

Arguments that several ops share:

- ``mean``, ``std``: float32 state (float64 with the reference backend), one tensor per parameter.
- ``param``, ``out``, ``grad``: the parameters and gradients, float32, bfloat16 or float16, shaped as the state.
- ``offsets``: flat index, in the whole parameter, of the first element of each tensor; 0 but for shards.
- ``streams``: one generator stream per parameter, in [0, 2**32). ``seed``: 64-bit generator key.
- ``counters``: int64 tensor of three: the draw number of the sample that the parameters hold, the Monte
  Carlo samples accumulated since the last update, and 1 once a non-finite update was refused.
- ``antithetic``: draws 2i and 2i + 1 are eps and -eps. ``stochastic_rounding``: of bfloat16 parameters.
- ``grad_scale``, ``found_inf``: as `torch.amp.GradScaler` hands them to fused optimizers.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..errors import UsageError
from . import reference
from .backends import AUTO, ENVIRONMENT, MODULES, BackendUnavailable, resolve, unavailable

__all__ = [
    "AUTO",
    "ENVIRONMENT",
    "MODULES",
    "BackendUnavailable",
    "accumulate",
    "gauss_newton",
    "gaussian_kl",
    "resolve",
    "sample",
    "step",
    "unavailable",
]

_GENERATOR = (
    "int[] offsets, int[] streams, int seed, Tensor{counters} counters, bool antithetic, bool stochastic_rounding"
)
_SCHEMAS = {
    "sample": (
        "(Tensor(a!)[] out, Tensor[] mean, Tensor[] std, "
        + _GENERATOR.format(counters="")
        + ', str backend="auto") -> ()'
    ),
    "accumulate": (
        "(Tensor(a!)[] param, Tensor(b!)[] m1, Tensor(c!)[] m2, Tensor[] grad, Tensor[] mean, Tensor[] std, "
        + _GENERATOR.format(counters="(d!)")
        + ', Tensor? grad_scale=None, Tensor? found_inf=None, str backend="auto") -> ()'
    ),
    "step": (
        "(Tensor(a!)[] param, Tensor(b!)[] mean, Tensor(c!)[] std, Tensor[] grad, Tensor[] m1, Tensor[] m2, "
        "Tensor[] prior_mean, Tensor[] prior_std, Tensor lr, Tensor kl_weight, float loss_scale, "
        + _GENERATOR.format(counters="(d!)")
        + ", float max_mean_step, float max_log_std_step, float max_std, bool learn_mean, bool learn_std, "
        'Tensor? grad_scale=None, Tensor? found_inf=None, str backend="auto") -> Tensor'
    ),
    "gauss_newton": (
        "(Tensor(a!)[] param, Tensor(b!)[] std, Tensor[] grad, Tensor[] mean, float evidence, "
        + _GENERATOR.format(counters="(c!)")
        + ', Tensor? grad_scale=None, Tensor? found_inf=None, str backend="auto") -> ()'
    ),
    "gaussian_kl": (
        # Keyword-only: torch 2.8's autograd loses count of positional arguments left at their default.
        "(Tensor[] mean, Tensor[] std, Tensor[] prior_mean, Tensor[] prior_std, *, "
        'str backend="auto") -> (Tensor, Tensor[], Tensor[])'
    ),
}
_library = torch.library.Library("distruction", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


# A step checks thousands of tensors before it may launch anything, so the checks first ask whether all is well, with
# few operations for each tensor, and look for the culprit only if it is not.


def _check_lists(mean: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    shapes, devices = [r.shape for r in mean], [r.device for r in mean]
    for name, tensors in lists.items():
        if [t.shape for t in tensors] == shapes and [t.device for t in tensors] == devices:
            continue
        if len(tensors) != len(mean):
            raise ValueError(f"{name} has {len(tensors)} tensors, mean has {len(mean)}; give one for each parameter")
        for i, (t, r) in enumerate(zip(tensors, mean, strict=True)):
            if t.shape != r.shape or t.device != r.device:
                raise ValueError(
                    f"{name}[{i}] is {tuple(t.shape)} on {t.device}, mean[{i}] is {tuple(r.shape)} on {r.device}; "
                    "they must agree"
                )


def _check_state(mean: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    _check_lists(mean, **lists)
    for name, tensors in {"mean": mean, **lists}.items():
        if {t.dtype for t in tensors} <= {m.dtype for m in mean[:1]} <= {torch.float32, torch.float64}:
            continue
        for i, t in enumerate(tensors):
            if t.dtype != mean[0].dtype or t.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name}[{i}] is {t.dtype}; state is float32 (or float64 throughout, with backend='reference')"
                )


def _served(
    backend: str,
    device: torch.device,
    state: dict[str, Sequence[Tensor]],
    samples: dict[str, Sequence[Tensor]] | None = None,
) -> ModuleType:
    """The backend for ``device``, which takes these tensors.

    Kernels get addresses, so that nothing but float32 state, contiguous and on one device, may pass.
    """
    module = resolve(backend, device.type)
    if module is reference:
        return module
    # The other lists are where ``mean`` is: `_check_lists`.
    for i, m in enumerate(state["mean"]):
        if m.device != device:
            raise ValueError(f"mean[{i}] is on {m.device}, the call's other tensors are on {device}")
    for types, lists in ((_KERNEL_TYPES[:1], state), (_KERNEL_TYPES, samples or {})):
        for name, tensors in lists.items():
            if all(map(Tensor.is_contiguous, tensors)) and {t.dtype for t in tensors} <= set(types):
                continue
            for i, t in enumerate(tensors):
                if not t.is_contiguous():
                    raise ValueError(
                        f"{name}[{i}] of shape {tuple(t.shape)} and strides {t.stride()} is not contiguous; pass it "
                        ".contiguous(), or choose backend='reference'"
                    )
                if t.dtype not in types:
                    raise ValueError(
                        f"{name}[{i}] is {t.dtype}, not {' or '.join(map(str, types))}; backend='reference' takes "
                        "other types"
                    )
    return module


def _check_pair(m1: Sequence[Tensor], m2: Sequence[Tensor], antithetic: bool) -> None:
    if m1 and not m2 and not antithetic:
        raise ValueError("m1 without m2 holds the first gradient of an antithetic pair; pass m2, or antithetic=True")


def _check_generator(mean: Sequence[Tensor], offsets: Sequence[int], streams: Sequence[int], counters: Tensor) -> None:
    if not len(offsets) == len(mean) == len(streams):
        raise ValueError(
            f"offsets ({len(offsets)}) and streams ({len(streams)}) need one entry per tensor ({len(mean)})"
        )
    if counters.dtype != torch.int64 or counters.shape != (3,) or not counters.is_contiguous():
        raise ValueError(
            f"counters must be int64 of shape (3,), contiguous, not {counters.dtype} of shape {tuple(counters.shape)} "
            f"and strides {counters.stride()}"
        )


def _sample_impl(out, mean, std, offsets, streams, seed, counters, antithetic, stochastic_rounding, backend="auto"):
    _check_state(mean, std=std)
    _check_lists(mean, out=out)
    _check_generator(mean, offsets, streams, counters)
    if mean:
        _served(backend, counters.device, {"mean": mean, "std": std}, {"out": out}).sample(
            out, mean, std, offsets, streams, seed, counters, antithetic, stochastic_rounding
        )


def _accumulate_impl(
    param,
    m1,
    m2,
    grad,
    mean,
    std,
    offsets,
    streams,
    seed,
    counters,
    antithetic,
    stochastic_rounding,
    grad_scale=None,
    found_inf=None,
    backend="auto",
):
    _check_state(mean, std=std, m1=m1, **({"m2": m2} if m2 else {}))
    _check_pair(m1, m2, antithetic)
    _check_lists(mean, param=param, grad=grad)
    _check_generator(mean, offsets, streams, counters)
    if mean:
        state = {"mean": mean, "std": std, "m1": m1, "m2": m2}
        _served(backend, counters.device, state, {"param": param, "grad": grad}).accumulate(
            param,
            m1,
            m2,
            grad,
            mean,
            std,
            offsets,
            streams,
            seed,
            counters,
            antithetic,
            stochastic_rounding,
            grad_scale,
            found_inf,
        )


def _step_impl(
    param,
    mean,
    std,
    grad,
    m1,
    m2,
    prior_mean,
    prior_std,
    lr,
    kl_weight,
    loss_scale,
    offsets,
    streams,
    seed,
    counters,
    antithetic,
    stochastic_rounding,
    max_mean_step,
    max_log_std_step,
    max_std,
    learn_mean,
    learn_std,
    grad_scale=None,
    found_inf=None,
    backend="auto",
):
    _check_state(mean, std=std)
    _check_lists(mean, param=param, grad=grad)
    if m1 or m2:
        _check_state(mean, m1=m1, **({"m2": m2} if m2 else {}))
        _check_pair(m1, m2, antithetic)
    if prior_mean or prior_std:
        _check_state(mean, prior_mean=prior_mean, prior_std=prior_std)
    _check_generator(mean, offsets, streams, counters)
    if not mean:
        return torch.zeros((), dtype=torch.float64, device=counters.device)
    state = {"mean": mean, "std": std, "m1": m1, "m2": m2, "prior_mean": prior_mean, "prior_std": prior_std}
    return _served(backend, counters.device, state, {"param": param, "grad": grad}).step(
        param,
        mean,
        std,
        grad,
        m1,
        m2,
        prior_mean,
        prior_std,
        lr,
        kl_weight,
        loss_scale,
        offsets,
        streams,
        seed,
        counters,
        antithetic,
        stochastic_rounding,
        max_mean_step,
        max_log_std_step,
        max_std,
        learn_mean,
        learn_std,
        grad_scale,
        found_inf,
    )


def _gauss_newton_impl(
    param,
    std,
    grad,
    mean,
    evidence,
    offsets,
    streams,
    seed,
    counters,
    antithetic,
    stochastic_rounding,
    grad_scale=None,
    found_inf=None,
    backend="auto",
):
    if not 0.0 <= evidence <= torch.finfo(torch.float32).max:
        raise UsageError(
            f"evidence is {evidence}, not a number of data points in float32's range; pass one that is at least 0"
        )
    _check_state(mean, std=std)
    _check_lists(mean, param=param, grad=grad)
    _check_generator(mean, offsets, streams, counters)
    if mean:
        state = {"mean": mean, "std": std}
        _served(backend, counters.device, state, {"param": param, "grad": grad}).gauss_newton(
            param,
            std,
            grad,
            mean,
            evidence,
            offsets,
            streams,
            seed,
            counters,
            antithetic,
            stochastic_rounding,
            grad_scale,
            found_inf,
        )


def _gaussian_kl_impl(mean, std, prior_mean, prior_std, *, backend="auto"):
    if not mean:
        raise ValueError("gaussian_kl needs at least one tensor")
    _check_state(mean, std=std, prior_mean=prior_mean, prior_std=prior_std)
    state = {"mean": mean, "std": std, "prior_mean": prior_mean, "prior_std": prior_std}
    return _served(backend, mean[0].device, state).gaussian_kl(mean, std, prior_mean, prior_std)


for _name, _impl in {
    "sample": _sample_impl,
    "accumulate": _accumulate_impl,
    "step": _step_impl,
    "gauss_newton": _gauss_newton_impl,
    "gaussian_kl": _gaussian_kl_impl,
}.items():
    _library.impl(_name, _impl, "CompositeExplicitAutograd")


@torch.library.register_fake("distruction::sample", lib=_library)
def _sample_fake(out, mean, std, *args, **kwargs):
    _check_lists(mean, out=out, std=std)


@torch.library.register_fake("distruction::accumulate", lib=_library)
def _accumulate_fake(param, m1, m2, grad, mean, std, *args, **kwargs):
    _check_lists(mean, param=param, m1=m1, grad=grad, std=std, **({"m2": m2} if m2 else {}))


@torch.library.register_fake("distruction::step", lib=_library)
def _step_fake(param, mean, std, grad, *args, **kwargs):
    _check_lists(mean, param=param, std=std, grad=grad)
    return torch.empty((), dtype=torch.float64, device=mean[0].device if mean else "cpu")


@torch.library.register_fake("distruction::gauss_newton", lib=_library)
def _gauss_newton_fake(param, std, grad, mean, *args, **kwargs):
    _check_lists(mean, param=param, std=std, grad=grad)


@torch.library.register_fake("distruction::gaussian_kl", lib=_library)
def _gaussian_kl_fake(mean, std, prior_mean, prior_std, *args, **kwargs):
    _check_lists(mean, std=std, prior_mean=prior_mean, prior_std=prior_std)
    total = torch.empty((), dtype=torch.float64, device=mean[0].device)
    return total, [torch.empty_like(m) for m in mean], [torch.empty_like(s) for s in std]


def _kl_setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*output[1], *output[2])
    ctx.set_materialize_grads(False)


def _kl_backward(ctx, grad_total, grad_of_grad_mean, grad_of_grad_std):
    saved = ctx.saved_tensors
    half = len(saved) // 2
    if grad_total is None:
        return [None] * half, [None] * half, [None] * half, [None] * half
    # The scale stays on its device: no host sync when this loss is not the last op.
    grads = [g * grad_total.to(g.dtype) for g in saved]
    return grads[:half], grads[half:], [None] * half, [None] * half


torch.library.register_autograd("distruction::gaussian_kl", _kl_backward, setup_context=_kl_setup_context, lib=_library)

sample = torch.ops.distruction.sample
"""``out <- mean + std * eps`` for the draw ``counters[0]``."""

accumulate = torch.ops.distruction.accumulate
"""Add ``grad`` and ``grad * eps`` to ``m1`` and ``m2``, advance the draw, and write the next sample into ``param``.

The first sample of an update (``counters[1]`` is 0) overwrites ``m1`` and ``m2`` instead, whatever they hold. With an
empty list ``m2`` the update is of one antithetic pair, and ``m1`` takes its first gradient, which is all that `step`
needs.
"""

step = torch.ops.distruction.step
"""The fused BGD step: update ``mean`` and ``std``, write the next sample into ``param``; returns KL(q || prior).

The gradient of the last sample is in ``grad``; ``m1`` and ``m2`` hold the sums over the samples before it
(``counters[1]`` of them), or are empty lists when there is one sample. An empty list ``m2`` alone says that the sample
completes an antithetic pair, whose first gradient is in ``m1``. ``prior_mean`` and ``prior_std`` are empty lists when
there is no prior. ``lr`` and ``kl_weight`` are scalar tensors, so that a schedule needs no recompilation;
``loss_scale`` multiplies the gradient. An element whose statistics or update are not finite keeps its mean and std, and
``counters[2]`` becomes 1. The KL, of the updated posterior, is a float64 scalar tensor (zero without a prior). The
formulas are in `distruction.ops.reference.step`.
"""

gauss_newton = torch.ops.distruction.gauss_newton
"""Add ``evidence * g**2`` to ``1 / std**2``, g the unscaled gradient, and write the next sample into ``param``.

That is ``std <- std / sqrt(1 + evidence * g**2 * std**2)``: std never grows, and does not fall below float32's
smallest normal number. ``evidence``, at least 0, is the number of data points that g**2 stands for. An element where
``|g * std * sqrt(evidence)|`` is more than 2**126 or not a number keeps its std, and ``counters[2]`` becomes 1.
``counters[1]`` becomes 0, as after every update. The source is in `distruction.ops.reference.gauss_newton`.
"""

gaussian_kl = torch.ops.distruction.gaussian_kl
"""KL(N(mean, std**2) || N(prior_mean, prior_std**2)) summed over all elements, with both gradients.

Returns the float64 sum and the lists of dKL/dmean and dKL/dstd; differentiable through the sum with respect to
``mean`` and ``std`` (the prior is a constant). ``backend`` is keyword-only.
"""
