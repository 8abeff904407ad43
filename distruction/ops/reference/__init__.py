"""The ``reference`` backend: plain PyTorch on any device, in the state's dtype (float32 or float64).

It is the oracle of the other backends: run on float64 copies of the state it is float64 maths throughout.
"""

from .gauss_newton import gauss_newton
from .kl import gaussian_kl
from .sample import sample
from .step import accumulate, step

__all__ = ["accumulate", "gauss_newton", "gaussian_kl", "sample", "step", "unavailable"]


def unavailable(device_type: str) -> str | None:
    """Always ``None``: the reference runs wherever PyTorch does."""
    return None
