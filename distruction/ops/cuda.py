"""The ``cuda`` backend: CUDA kernels."""


def unavailable(device_type: str) -> str:
    """Why the CUDA kernels cannot serve ``device_type``."""
    return "the CUDA kernels are not part of this version"
