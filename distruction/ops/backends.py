"""The one table of backends: which implementation of the ops serves which device.

A backend is a module with the functions of `Backend`.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor

from ..errors import BackendUnavailable, DistructionWarning, UsageError
from .calls import Amp, Draws, Rule, State


class Backend(Protocol):
    """What a backend's module has; what the functions do is in `distruction.ops`, which has checked the tensors."""

    __name__: str

    def unavailable(self, device_type: str) -> str | None:
        """Why it cannot serve a device type, or ``None`` where it can."""

    def sample(self, out: Sequence[Tensor], state: State, draws: Draws) -> None:
        """See `distruction.ops.sample`."""

    def accumulate(self, param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, amp: Amp) -> None:
        """See `distruction.ops.accumulate`."""

    def step(
        self, param: Sequence[Tensor], grad: Sequence[Tensor], state: State, draws: Draws, rule: Rule, amp: Amp
    ) -> Tensor:
        """See `distruction.ops.step`."""

    def gauss_newton(
        self,
        param: Sequence[Tensor],
        grad: Sequence[Tensor],
        state: State,
        draws: Draws,
        root_evidence: float,
        amp: Amp,
    ) -> None:
        """See `distruction.ops.gauss_newton`; takes the root of the evidence."""

    def gaussian_kl(self, state: State) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """See `distruction.ops.gaussian_kl`."""


MODULES = {
    "reference": "distruction.ops.reference",
    "cpp": "distruction.ops.cpp",
    "cuda": "distruction.ops.cuda",
    "triton": "distruction.kernels",
}
"""Backend name to the module that implements it."""

AUTO = {"cpu": ("cpp", "reference"), "cuda": ("triton", "cuda", "reference")}
"""Device type to the backends that ``backend="auto"`` tries, best first; ROCm devices are ``cuda`` too."""

ENVIRONMENT = "DISTRUCTION_BACKEND"
"""The environment variable that replaces ``"auto"``."""


@functools.cache
def _load(name: str) -> Backend | str:
    try:
        return cast(Backend, importlib.import_module(MODULES[name]))
    except ImportError as error:
        return str(error)


def unavailable(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot serve ``device_type`` with a remedy, or ``None`` where it can."""
    module = _load(name)
    return module if isinstance(module, str) else module.unavailable(device_type)


def resolve(name: str, device_type: str) -> Backend:
    """The module that serves ``device_type`` when a user asked for backend ``name``.

    Warns, once, where ``"auto"`` finds no kernels for the device.

    Raises:
        UsageError: ``name`` is no backend.
        BackendUnavailable: it cannot serve the device; the message says why and what to do.
    """
    if name == "auto":
        name = os.environ.get(ENVIRONMENT, "auto")
    return _resolve(name, device_type)


@functools.cache
def _resolve(name: str, device_type: str) -> Backend:
    if name == "auto":
        reasons = {b: unavailable(b, device_type) for b in AUTO.get(device_type, ("reference",))}
        name = next(b for b, reason in reasons.items() if reason is None)
        if name == "reference" and device_type in AUTO:
            missing = "; ".join(f"{b}: {reason}" for b, reason in reasons.items() if reason is not None)
            warnings.warn(
                f"plain PyTorch serves {device_type!r} tensors, many times slower ({missing})",
                DistructionWarning,
                stacklevel=2,
            )
    if name not in MODULES:
        raise UsageError(f"backend {name!r} is unknown; choose auto, {', '.join(MODULES)}")
    reason = unavailable(name, device_type)
    if reason is not None:
        raise BackendUnavailable(
            f"backend {name!r} cannot serve {device_type!r} tensors: {reason}. Use backend='auto' to fall back."
        )
    module = _load(name)
    assert not isinstance(module, str)
    return module
