"""The ``triton`` backend: fused kernels for CUDA and ROCm devices."""


def unavailable(device_type: str) -> str:
    """Why Triton cannot serve ``device_type``."""
    return "the Triton kernels are not part of this version"
