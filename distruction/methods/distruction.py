"""DiStruction: an objective on the forget set and the KL penalty to the posterior of preparation.

Dugue, "Machine Unlearning Without Repair using DiStruction", 2024.
"""

import functools
from typing import Any, Literal

from ..data import loader
from ..forget_report import ForgetReport
from ..forgetting import forget
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


def found(
    task: Task,
    *,
    target: Literal["gone", "sub-class", "unseen", "corrected"] | None = None,
    objective: str | None = None,
    level: float | None = None,
    data_per_step: float = 100.0,
    depth: Literal["features"] | None = None,
) -> ForgetReport:
    """The same from a Gauss-Newton posterior, with lambda found during the run: `distruction.forget` as it is.

    Args:
        objective: a name in `distruction.objectives.REGISTRY`; ``None`` is the target's.
        target, level, data_per_step, depth: see `distruction.forget`.
    """
    return forget(
        task.model,
        task.prior,
        loader(task.forget, batch_size=64, shuffle=True),
        target=target,
        objective=objective,
        level=level,
        data_per_step=data_per_step,
        depth=depth,
        seed=task.seed,
        backend=task.backend,
        progress=task.progress,
    )


FOUND = Method(
    "distruction from a Gauss-Newton posterior, at the means, with lambda found",
    "this library; the objective: Dugue 2024",
    found,
    reads="none",
    needs_posterior=True,
    preparation="gauss-newton",
    sweep="level",
    revision=2,
)

REMOVED = Method(
    "the same with ``depth='features'``, where nothing else is asked for",
    "this library; the dispersion of features: Spotter, 2026",
    functools.partial(found, depth="features"),
    reads="none",
    needs_posterior=True,
    preparation="gauss-newton",
    sweep="level",
    scenarios=("full-class",),
    revision=1,
)
