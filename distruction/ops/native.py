"""What the ``cpp`` and ``cuda`` backends share: finding their libraries, and handing tensors to plain C.

The libraries are built from ``csrc/`` without PyTorch's or Python's headers: they take pointers, so that one build
serves every version of both, and pip's isolated build environment needs no PyTorch. (LibTorch's stable ABI, the
other way to that end, begins with PyTorch 2.10; its registration and dispatch are Python's here.) This module
mirrors the structures of ``csrc/model.h``; `distruction.ops` has checked every tensor.
"""

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ABI = 4
"""The interface that this version of the package speaks; ``distruction_abi()`` of a library must be the same."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ARRAYS = (
    "numel",
    "offset",
    "stream",
    "param",
    "param_type",
    "grad",
    "grad_type",
    "mean",
    "std",
    "m1",
    "m2",
    "prior_mean",
    "prior_std",
    "grad_mean",
    "grad_std",
)


class Model(ctypes.Structure):
    """``distruction::Model``: one pointer to an array per kind of tensor."""

    _fields_ = (
        ("tensors", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        ("counters", ctypes.c_void_p),
        ("seed", ctypes.c_int64),
        ("antithetic", ctypes.c_int32),
        ("stochastic_rounding", ctypes.c_int32),
    )


class Options(ctypes.Structure):
    """``distruction::Options``: the scalars of an update, or pointers to those that live on a GPU."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("lr", "kl_weight", "loss_scale", "grad_scale")),
        *(
            (name, ctypes.c_void_p)
            for name in ("lr_pointer", "kl_weight_pointer", "grad_scale_pointer", "found_inf_pointer")
        ),
        *((name, ctypes.c_float) for name in ("max_mean_step", "max_a", "max_std", "root_evidence")),
        ("learn_mean", ctypes.c_int32),
        ("learn_std", ctypes.c_int32),
    )


def load(name: str, remedy: str) -> ctypes.CDLL:
    """The library ``name``.

    Raises:
        ImportError: it was not built, is of another version or cannot be loaded; the message says what to do.
    """
    path = Path(__file__).with_name(f"libdistruction_{name}.so")
    if not path.exists():
        raise ImportError(f"{path.name} was not built when the package was installed; {remedy}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path} cannot be loaded ({error}); {remedy}") from error
    if library.distruction_abi() != ABI:
        raise ImportError(f"{path} belongs to another version of the package; {remedy}")
    return library


def _int64s(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def model(
    state: dict[str, Sequence[Tensor]],
    *,
    param: Sequence[Tensor] = (),
    grad: Sequence[Tensor] = (),
    offsets: Sequence[int] = (),
    streams: Sequence[int] = (),
    seed: int = 0,
    counters: Tensor | None = None,
    antithetic: bool = False,
    stochastic_rounding: bool = False,
) -> tuple[Model, list[object]]:
    """Fill a `Model`; the second value keeps its arrays alive.

    Args:
        state: lists of float32 tensors by their name in the structure; empty lists become null.
    """
    mean = state["mean"]
    arrays = {
        "numel": _int64s([m.numel() for m in mean]),
        "offset": _int64s(offsets or [0] * len(mean)),
        "stream": _int64s(streams or [0] * len(mean)),
    }
    for name, tensors in {**state, "param": param, "grad": grad}.items():
        if tensors:
            arrays[name] = _int64s([t.data_ptr() for t in tensors])
    for name, tensors in (("param", param), ("grad", grad)):
        if tensors:
            arrays[name + "_type"] = _int64s([_TYPES[t.dtype] for t in tensors])
    filled = Model(
        tensors=len(mean),
        **{name: ctypes.addressof(array) for name, array in arrays.items()},
        counters=counters.data_ptr() if counters is not None else None,
        # ctypes keeps the low 64 bits, so that a negative seed is its two's complement.
        seed=seed,
        antithetic=antithetic,
        stochastic_rounding=stochastic_rounding,
    )
    return filled, [arrays, counters]


def mutated(*lists: Sequence[Tensor]) -> None:
    """Tell autograd of writes that it cannot see, as an in-place operator does."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


class Kernels(ABC):
    """The ops of a backend over its launchers, which read `Model` and `Options`; signatures as in the reference."""

    @abstractmethod
    def launch(
        self,
        name: str,
        model: Model,
        device: torch.device,
        *,
        scalars: dict[str, Tensor | None] | None = None,
        options: dict[str, float | bool] | None = None,
    ) -> Tensor | None:
        """Run a kernel; returns the KL of those that sum it.

        Args:
            name: sample, accumulate, step, gauss_newton or gaussian_kl.
            model: the tensors.
            device: theirs.
            scalars: lr, kl_weight, grad_scale and found_inf, as the op got them.
            options: the other fields of `Options`.
        """

    def sample(
        self,
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
        filled, _keep = model(
            {"mean": mean, "std": std},
            param=out,
            offsets=offsets,
            streams=streams,
            seed=seed,
            counters=counters,
            antithetic=antithetic,
            stochastic_rounding=stochastic_rounding,
        )
        self.launch("sample", filled, counters.device)
        mutated(out)

    def accumulate(
        self,
        param: Sequence[Tensor],
        m1: Sequence[Tensor],
        m2: Sequence[Tensor],
        grad: Sequence[Tensor],
        mean: Sequence[Tensor],
        std: Sequence[Tensor],
        offsets: Sequence[int],
        streams: Sequence[int],
        seed: int,
        counters: Tensor,
        antithetic: bool,
        stochastic_rounding: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """See `distruction.ops.accumulate`."""
        filled, _keep = model(
            {"mean": mean, "std": std, "m1": m1, "m2": m2},
            param=param,
            grad=grad,
            offsets=offsets,
            streams=streams,
            seed=seed,
            counters=counters,
            antithetic=antithetic,
            stochastic_rounding=stochastic_rounding,
        )
        scalars = {"grad_scale": grad_scale, "found_inf": found_inf}
        self.launch("accumulate", filled, counters.device, scalars=scalars)
        mutated(param, m1, m2, [counters])

    def step(
        self,
        param: Sequence[Tensor],
        mean: Sequence[Tensor],
        std: Sequence[Tensor],
        grad: Sequence[Tensor],
        m1: Sequence[Tensor],
        m2: Sequence[Tensor],
        prior_mean: Sequence[Tensor],
        prior_std: Sequence[Tensor],
        lr: Tensor,
        kl_weight: Tensor,
        loss_scale: float,
        offsets: Sequence[int],
        streams: Sequence[int],
        seed: int,
        counters: Tensor,
        antithetic: bool,
        stochastic_rounding: bool,
        max_mean_step: float,
        max_log_std_step: float,
        max_std: float,
        learn_mean: bool,
        learn_std: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor:
        """See `distruction.ops.step`."""
        filled, _keep = model(
            {"mean": mean, "std": std, "m1": m1, "m2": m2, "prior_mean": prior_mean, "prior_std": prior_std},
            param=param,
            grad=grad,
            offsets=offsets,
            streams=streams,
            seed=seed,
            counters=counters,
            antithetic=antithetic,
            stochastic_rounding=stochastic_rounding,
        )
        kl = self.launch(
            "step",
            filled,
            counters.device,
            scalars={"lr": lr, "kl_weight": kl_weight, "grad_scale": grad_scale, "found_inf": found_inf},
            options={
                "loss_scale": loss_scale,
                "max_mean_step": max_mean_step,
                # asinh(a) <= max_log_std_step bounds |delta log std|.
                "max_a": math.sinh(max_log_std_step) if max_log_std_step < 700 else math.inf,
                "max_std": max_std,
                "learn_mean": learn_mean,
                "learn_std": learn_std,
            },
        )
        mutated(param, [counters], mean if learn_mean else [], std if learn_std else [])
        assert kl is not None
        return kl

    def gauss_newton(
        self,
        param: Sequence[Tensor],
        std: Sequence[Tensor],
        grad: Sequence[Tensor],
        mean: Sequence[Tensor],
        evidence: float,
        offsets: Sequence[int],
        streams: Sequence[int],
        seed: int,
        counters: Tensor,
        antithetic: bool,
        stochastic_rounding: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """See `distruction.ops.gauss_newton`."""
        filled, _keep = model(
            {"mean": mean, "std": std},
            param=param,
            grad=grad,
            offsets=offsets,
            streams=streams,
            seed=seed,
            counters=counters,
            antithetic=antithetic,
            stochastic_rounding=stochastic_rounding,
        )
        self.launch(
            "gauss_newton",
            filled,
            counters.device,
            scalars={"grad_scale": grad_scale, "found_inf": found_inf},
            options={"root_evidence": math.sqrt(evidence)},
        )
        mutated(param, std, [counters])

    def gaussian_kl(
        self,
        mean: Sequence[Tensor],
        std: Sequence[Tensor],
        prior_mean: Sequence[Tensor],
        prior_std: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """See `distruction.ops.gaussian_kl`."""
        grad_mean, grad_std = [torch.empty_like(m) for m in mean], [torch.empty_like(s) for s in std]
        state = {"mean": mean, "std": std, "prior_mean": prior_mean, "prior_std": prior_std}
        filled, _keep = model({**state, "grad_mean": grad_mean, "grad_std": grad_std})
        kl = self.launch("gaussian_kl", filled, mean[0].device)
        assert kl is not None
        return kl, grad_mean, grad_std
