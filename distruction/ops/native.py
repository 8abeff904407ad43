"""What the ``cpp`` and ``cuda`` backends share: finding their libraries, and handing tensors to plain C.

The libraries are built from ``csrc/`` without PyTorch's or Python's headers: they take pointers, so that one build
serves every version of both, and pip's isolated build environment needs no PyTorch. (LibTorch's stable ABI, the
other way to that end, begins with PyTorch 2.10; its registration and dispatch are Python's here.) This module
mirrors the structures of ``csrc/model.h``; `distruction.ops` has checked every tensor.
"""

import ctypes
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .calls import Amp, Draws, Rule, State

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


_RULE = ("loss_scale", "max_mean_step", "max_a", "max_std", "learn_mean", "learn_std")

Scalars = Mapping[str, Tensor | None]
"""The scalars that may live on a GPU: lr, kl_weight, grad_scale, found_inf."""

Numbers = Mapping[str, float | bool]
"""The other fields of `Options`."""


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


def model(state: State, draws: Draws | None = None, **lists: Sequence[Tensor]) -> tuple[Model, list[object]]:
    """Fill a `Model`; the second value keeps its arrays alive.

    Args:
        lists: further tensors by their name in the structure; empty lists, as those of the state, become null.
    """
    n = len(state.mean)
    arrays = {
        "numel": array("q", map(Tensor.numel, state.mean)),
        "offset": array("q", draws.offsets if draws else [0] * n),
        "stream": array("q", draws.streams if draws else [0] * n),
    }
    for name, tensors in {**vars(state), **lists}.items():
        if tensors:
            arrays[name] = array("q", map(Tensor.data_ptr, tensors))
        if tensors and name in ("param", "grad"):
            arrays[name + "_type"] = array("q", [_TYPES[t.dtype] for t in tensors])
    filled = Model(tensors=n, **{name: values.buffer_info()[0] for name, values in arrays.items()})
    if draws:
        filled.counters = draws.counters.data_ptr()
        # ctypes keeps the low 64 bits, so that a negative seed is its two's complement.
        filled.seed = draws.seed
        filled.antithetic, filled.stochastic_rounding = draws.antithetic, draws.stochastic_rounding
    return filled, [arrays, draws]


def mutated(*lists: Sequence[Tensor]) -> None:
    """Tell autograd of writes that it cannot see, as an in-place operator does."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


class Kernels(ABC):
    """The functions of `distruction.ops.backends.Backend` over a library's launchers, which read these structures."""

    @abstractmethod
    def launch(
        self, name: str, model: Model, device: torch.device, scalars: Scalars, numbers: Numbers
    ) -> Tensor | None:
        """Run the kernel of an op on tensors of ``device``; returns the KL of those that sum it."""

    def sample(self, out: Sequence[Tensor], state: State, draws: Draws) -> None:
        """See `distruction.ops.sample`."""
        filled, _keep = model(state, draws, param=out)
        self.launch("sample", filled, draws.counters.device, {}, {})
        mutated(out)

    def accumulate(self, param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, amp: Amp) -> None:
        """See `distruction.ops.accumulate`."""
        filled, _keep = model(state, draws, param=param, grad=grad)
        self.launch("accumulate", filled, draws.counters.device, vars(amp), {})
        mutated(param, state.m1, state.m2, [draws.counters])

    def step(
        self, param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, rule: Rule, amp: Amp
    ) -> Tensor:
        """See `distruction.ops.step`."""
        filled, _keep = model(state, draws, param=param, grad=grad)
        scalars = {"lr": rule.lr, "kl_weight": rule.kl_weight, **vars(amp)}
        numbers = {name: getattr(rule, name) for name in _RULE}
        kl = self.launch("step", filled, draws.counters.device, scalars, numbers)
        learnt = (state.mean if rule.learn_mean else (), state.std if rule.learn_std else ())
        mutated(param, [draws.counters], *learnt)
        assert kl is not None
        return kl

    def gauss_newton(
        self,
        param: Sequence[Tensor],
        grad: Sequence[Tensor],
        state: State,
        draws: Draws,
        root_evidence: float,
        amp: Amp,
    ) -> None:
        """See `distruction.ops.gauss_newton`."""
        filled, _keep = model(state, draws, param=param, grad=grad)
        numbers = {"root_evidence": root_evidence}
        self.launch("gauss_newton", filled, draws.counters.device, vars(amp), numbers)
        mutated(param, state.std, [draws.counters])

    def gaussian_kl(self, state: State) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """See `distruction.ops.gaussian_kl`."""
        grad_mean, grad_std = [torch.empty_like(m) for m in state.mean], [torch.empty_like(s) for s in state.std]
        filled, _keep = model(state, grad_mean=grad_mean, grad_std=grad_std)
        kl = self.launch("gaussian_kl", filled, state.mean[0].device, {}, {})
        assert kl is not None
        return kl, grad_mean, grad_std
