"""The ``triton`` backend: fused kernels for NVIDIA and AMD GPUs, one launch for all tensors of a type."""

import torch

from .gauss_newton import gauss_newton
from .kl import gaussian_kl
from .sample import sample
from .step import accumulate, step
from .tables import INTERPRETED, interpreter_fails

__all__ = ["accumulate", "gauss_newton", "gaussian_kl", "sample", "step", "unavailable"]


def unavailable(device_type: str) -> str | None:
    """Why Triton cannot serve ``device_type``, or ``None`` where it can."""
    if device_type == "cpu":
        if INTERPRETED:
            return interpreter_fails()
        return "Triton compiles for GPUs; TRITON_INTERPRET=1, set before Python starts, interprets its kernels, slowly"
    if device_type != "cuda":
        return "the Triton kernels take tensors on NVIDIA and AMD GPUs"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 interprets the kernels on the CPU; unset it"
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA or ROCm device"
