"""The ``cuda`` backend: CUDA kernels for NVIDIA GPUs without Triton (``csrc/cuda``).

A whole model takes one launch (one per 320 tensors), and no call waits for the device: the scalars that live
there are read there.
"""

import ctypes

import torch
from torch import Tensor

from . import native

_library = native.load("cuda", "install the CUDA toolkit and reinstall the package with DISTRUCTION_BUILD_CUDA=1")
_library.distruction_cuda_error.restype = ctypes.c_char_p
_library.distruction_cuda_chunks.restype = ctypes.c_int64


def toolkit() -> str:
    """The version of the CUDA toolkit that built the library."""
    number = _library.distruction_cuda_toolkit()
    return f"{number // 1000}.{number % 1000 // 10}"


def unavailable(device_type: str) -> str | None:
    """Why the CUDA kernels cannot serve ``device_type``, or ``None`` where they can."""
    if device_type != "cuda" or torch.version.hip is not None:
        return "the CUDA kernels take tensors on NVIDIA GPUs"
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


class _Kernels(native.Kernels):
    def launch(
        self, name: str, model: native.Model, device: torch.device, scalars: native.Scalars, numbers: native.Numbers
    ) -> Tensor | None:
        fields: dict[str, float] = {"grad_scale": 1.0, **numbers}
        kept = []  # what the pointers point to
        for scalar, value in scalars.items():
            if value is None:
                continue
            if value.device.type == "cpu" and scalar != "found_inf":
                fields[scalar] = value.item()
            else:
                kept.append(value.to(device, torch.float32))
                fields[f"{scalar}_pointer"] = kept[-1].data_ptr()
        arguments: list[object] = []
        if name in ("accumulate", "step", "gauss_newton"):
            arguments.append(ctypes.byref(native.Options(**fields)))
        kl: Tensor | None = None
        if name in ("step", "gaussian_kl"):
            chunks = _library.distruction_cuda_chunks(ctypes.byref(model))
            partial = torch.empty(chunks, dtype=torch.float64, device=device)
            kl = torch.empty((), dtype=torch.float64, device=device)
            arguments += [ctypes.c_void_p(partial.data_ptr()), ctypes.c_void_p(kl.data_ptr())]
        with torch.cuda.device(device):
            error = getattr(_library, f"distruction_cuda_{name}")(
                ctypes.c_int32(torch.cuda.current_device()),
                ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
                ctypes.byref(model),
                *arguments,
            )
        if error != 0:
            raise RuntimeError(f"CUDA kernel {name!r}: {_library.distruction_cuda_error(error).decode()}")
        return kl


_kernels = _Kernels()
sample = _kernels.sample
accumulate = _kernels.accumulate
step = _kernels.step
gauss_newton = _kernels.gauss_newton
gaussian_kl = _kernels.gaussian_kl
