"""The ``cpp`` backend: vectorised C++ kernels for CPU tensors."""


def unavailable(device_type: str) -> str:
    """Why the C++ kernels cannot serve ``device_type``."""
    return "the C++ kernels are not part of this version"
