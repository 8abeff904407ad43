"""DiStruction: an objective on the forget set and the KL penalty to the posterior of preparation.

Dugue, "Machine Unlearning Without Repair using DiStruction", 2024.
"""

from typing import Any

from ..forget import ForgetReport
from ..objectives import DEFAULT
from .base import Method, Task, forget_with


def distruction(task: Task, *, objective: str = DEFAULT, **settings: Any) -> ForgetReport:
    """BGD on the forget set alone; see `distruction.forget`.

    Args:
        objective: a name in `distruction.objectives.REGISTRY`.
        settings: those of `base.forget_with`.
    """
    return forget_with(task, objective, task.forget, **settings)


METHOD = Method(
    "forget under the KL penalty to the posterior of preparation",
    "Dugue 2024",
    distruction,
    reads="none",
    needs_posterior=True,
    sweep="kl_weight",
)
