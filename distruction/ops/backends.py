"""The one table of backends: which implementation of the ops serves which device.

A backend is a module with the functions ``sample``, ``accumulate``, ``step``, ``gauss_newton`` and ``gaussian_kl``
of the signatures in `distruction.ops.reference`, and ``unavailable(device)``: why it cannot serve a device type,
or ``None`` where it can.
"""

import functools
import importlib
import os
import warnings
from types import ModuleType

from ..errors import DistructionError, UsageError

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


class BackendUnavailable(DistructionError, RuntimeError):
    """An explicitly chosen backend cannot serve the device."""


@functools.cache
def _load(name: str) -> ModuleType | str:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        return str(error)


def unavailable(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot serve ``device_type`` with a remedy, or ``None`` where it can."""
    module = _load(name)
    if isinstance(module, str):
        return module
    reason: str | None = module.unavailable(device_type)
    return reason


def resolve(name: str, device_type: str) -> ModuleType:
    """The module that serves ``device_type`` when a user asked for backend ``name``.

    Warns, once, where ``"auto"`` finds no kernels for the device.

    Raises:
        ValueError: ``name`` is no backend.
        BackendUnavailable: it cannot serve the device; the message says why and what to do.
    """
    if name == "auto":
        name = os.environ.get(ENVIRONMENT, "auto")
    return _resolve(name, device_type)


@functools.cache
def _resolve(name: str, device_type: str) -> ModuleType:
    if name == "auto":
        reasons = {b: unavailable(b, device_type) for b in AUTO.get(device_type, ("reference",))}
        name = next(b for b, reason in reasons.items() if reason is None)
        if name == "reference" and device_type in AUTO:
            missing = "; ".join(f"{b}: {reason}" for b, reason in reasons.items() if reason is not None)
            warnings.warn(f"plain PyTorch serves {device_type!r} tensors, many times slower ({missing})", stacklevel=2)
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
