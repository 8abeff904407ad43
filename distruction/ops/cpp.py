"""The ``cpp`` backend: vectorised C++ kernels for CPU tensors (``csrc/cpu``).

The best instruction set of the CPU serves, or the one that the environment variable
``DISTRUCTION_INSTRUCTION_SET`` names: ``avx512``, ``avx2``, ``baseline`` (128-bit vectors) or ``scalar``
(one element at a time, the arithmetic of the CUDA kernels). Results do not depend on the number of threads
(`torch.set_num_threads`); between instruction sets they differ by rounding.
"""

import ctypes
import functools
import os

import torch
from torch import Tensor

from . import native

ENVIRONMENT = "DISTRUCTION_INSTRUCTION_SET"
"""The environment variable that forces an instruction set."""

_library = native.load("cpu", "install a C++ compiler (g++ or clang++) and reinstall the package")
_library.distruction_cpu_set.restype = ctypes.c_char_p
_library.distruction_cpu_sample.restype = _library.distruction_cpu_accumulate.restype = None
_library.distruction_cpu_gauss_newton.restype = None
_library.distruction_cpu_step.restype = ctypes.c_double
_library.distruction_cpu_gaussian_kl.restype = ctypes.c_double


@functools.cache
def instruction_sets() -> dict[str, tuple[int, bool]]:
    """Each instruction set of the build, best first: its number, and whether this CPU has it."""
    sets: dict[str, tuple[int, bool]] = {}
    usable = ctypes.c_int32()
    while (name := _library.distruction_cpu_set(len(sets), ctypes.byref(usable))) is not None:
        sets[name.decode()] = (len(sets), bool(usable.value))
    return sets


@functools.cache
def _set_number(name: str | None) -> int:
    usable = {n: number for n, (number, ok) in instruction_sets().items() if ok}
    if name is None:
        return next(iter(usable.values()))
    if name not in usable:
        raise ValueError(f"{ENVIRONMENT}={name!r}: this CPU and build have {', '.join(usable)}")
    return usable[name]


@functools.cache
def _parallel_for() -> int | None:
    """PyTorch's thread pool in its stable C interface, which appeared in PyTorch 2.10."""
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (AttributeError, OSError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def unavailable(device_type: str) -> str | None:
    """Why the C++ kernels cannot serve ``device_type``, or ``None`` where they can."""
    return None if device_type == "cpu" else "the C++ kernels take CPU tensors"


def words(block: int, blocks: int, *, draw: int, stream: int, seed: int) -> Tensor:
    """The generator's words (int64, shape (blocks, 4)) of consecutive blocks; the normals are made from these."""
    out = torch.empty(blocks, 4, dtype=torch.int32)
    _library.distruction_cpu_words(
        ctypes.c_int32(_set_number(os.environ.get(ENVIRONMENT))),
        *(ctypes.c_int64(value) for value in (block, blocks, draw, stream, seed)),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out.long() & 0xFFFFFFFF


class _Kernels(native.Kernels):
    def launch(
        self, name: str, model: native.Model, device: torch.device, scalars: native.Scalars, numbers: native.Numbers
    ) -> Tensor | None:
        values = {k: v.item() for k, v in scalars.items() if v is not None}
        arguments: tuple[object, ...] = ()
        if values.pop("found_inf", 0.0) != 0:
            # The update is refused; its KL is still that of the posterior.
            if name != "step":
                return None
            if not model.prior_mean:
                return torch.zeros((), dtype=torch.float64)
            name = "gaussian_kl"
        elif name in ("accumulate", "step", "gauss_newton"):
            arguments = (ctypes.byref(native.Options(**{"grad_scale": 1.0, **values, **numbers})),)
        kernel = getattr(_library, f"distruction_cpu_{name}")
        kl = kernel(
            ctypes.c_int32(_set_number(os.environ.get(ENVIRONMENT))),
            ctypes.c_void_p(_parallel_for()),
            ctypes.c_int64(torch.get_num_threads()),
            ctypes.byref(model),
            *arguments,
        )
        return torch.tensor(kl, dtype=torch.float64) if kernel.restype is ctypes.c_double else None


_kernels = _Kernels()
sample = _kernels.sample
accumulate = _kernels.accumulate
step = _kernels.step
gauss_newton = _kernels.gauss_newton
gaussian_kl = _kernels.gaussian_kl
