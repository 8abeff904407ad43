"""How much memory `prepare` and `forget` will need, found before anything is allocated.

What stays through a run is counted. What comes and goes, activations and gradients, is found by running a forward and a
backward pass on fake tensors, which have shapes and lifetimes but no memory, and following the bytes alive.
"""

from .estimate import DTYPES, Options, Phase, Plan, plan
from .free import free_memory
from .table import table, verdict
from .tracing import empty, peak_of_a_pass

__all__ = [
    "DTYPES",
    "Options",
    "Phase",
    "Plan",
    "empty",
    "free_memory",
    "peak_of_a_pass",
    "plan",
    "table",
    "verdict",
]
