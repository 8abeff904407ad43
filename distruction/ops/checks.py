"""What the ops require of their arguments.

A step checks thousands of tensors before it may launch anything, so the checks first ask whether all is well, with
few operations for each tensor, and look for the culprit only if it is not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UsageError
from . import reference
from .backends import Backend, resolve
from .calls import Draws, State

_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_lists(mean: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    """Require lists of one length, with shapes and devices as those of ``mean``."""
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


def check_state(state: State, *others: str) -> None:
    """Require float32 or float64 throughout; of the lists that may be empty, those that ``others`` names are looked at.

    A prior is two lists, one of which must not be empty alone.
    """
    lists = {"std": state.std, **{name: getattr(state, name) for name in others}}
    check_lists(state.mean, **lists)
    types = {m.dtype for m in state.mean[:1]}
    for name, tensors in {"mean": state.mean, **lists}.items():
        if {t.dtype for t in tensors} <= types <= {torch.float32, torch.float64}:
            continue
        for i, t in enumerate(tensors):
            if t.dtype != state.mean[0].dtype or t.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name}[{i}] is {t.dtype}; state is float32 (or float64 throughout, with backend='reference')"
                )


def check_statistics(state: State, draws: Draws) -> None:
    """Require two sums, or the first gradient of an antithetic pair."""
    check_state(state, "m1", *(["m2"] if state.m2 else []))
    if state.m1 and not state.m2 and not draws.antithetic:
        raise ValueError("m1 without m2 holds the first gradient of an antithetic pair; pass m2, or antithetic=True")


def check_draws(state: State, draws: Draws) -> None:
    """Require an offset and a stream for each tensor, and the three counters."""
    if not len(draws.offsets) == len(state.mean) == len(draws.streams):
        raise ValueError(
            f"offsets ({len(draws.offsets)}) and streams ({len(draws.streams)}) need one entry per tensor "
            f"({len(state.mean)})"
        )
    counters = draws.counters
    if counters.dtype != torch.int64 or counters.shape != (3,) or not counters.is_contiguous():
        raise ValueError(
            f"counters must be int64 of shape (3,), contiguous, not {counters.dtype} of shape {tuple(counters.shape)} "
            f"and strides {counters.stride()}"
        )


def check_evidence(evidence: float) -> None:
    """Require a number of data points that float32 holds."""
    if not 0.0 <= evidence <= torch.finfo(torch.float32).max:
        raise UsageError(
            f"evidence is {evidence}, not a number of data points in float32's range; pass one that is at least 0"
        )


def served(backend: str, device: torch.device, state: State, **samples: Sequence[Tensor]) -> Backend:
    """The backend for ``device``, which takes these tensors.

    Kernels get addresses, so that nothing but float32 state, contiguous and on one device, may pass.

    Args:
        samples: the lists that may be of a sample's types.
    """
    module = resolve(backend, device.type)
    if module is reference:
        return module
    # The other lists are where ``mean`` is: `check_lists`.
    for i, m in enumerate(state.mean):
        if m.device != device:
            raise ValueError(f"mean[{i}] is on {m.device}, the call's other tensors are on {device}")
    for types, lists in ((_KERNEL_TYPES[:1], vars(state)), (_KERNEL_TYPES, samples)):
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
