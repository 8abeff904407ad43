"""Unlearning methods by name: one signature, ``run(task, **settings)``, whatever they read.

A name that ends in ``+kl`` is the method with its retain-data term replaced by the KL penalty to the posterior of
preparation (paper, section 3.2): it reads no retain example.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch

from ..errors import UsageError
from ..forget_report import ForgetReport
from ..registry import Registry
from . import ablations, amnesiac, baseline, delete, distruction, finetune, retrain, scrub, ssd, teacher, unsir
from .base import Counted, Method, Task, forget_with

_OWN = {
    "baseline": baseline.METHOD,
    "retrain": retrain.METHOD,
    "finetune": finetune.METHOD,
    "teacher": teacher.METHOD,
    "unsir": unsir.METHOD,
    "amnesiac": amnesiac.METHOD,
    "ssd": ssd.BATCH_MEAN,
    "ssd-per-sample": ssd.PER_SAMPLE,
    "scrub": scrub.METHOD,
    "delete": delete.METHOD,
    "teacher+kl": teacher.WITH_KL,
    "unsir+kl": unsir.WITH_KL,
    "amnesiac+kl": amnesiac.WITH_KL,
    "scrub+kl": scrub.WITH_KL,
    "distruction": distruction.METHOD,
    "distruction-auto": distruction.FOUND,
    "distruction-depth": distruction.REMOVED,
    "distruction-constant": ablations.CONSTANT,
    "distruction-fisher": ablations.FISHER,
}
REGISTRY = Registry[Method]("method", _OWN)
"""In the order of the tables."""

__all__ = ["REGISTRY", "Counted", "Method", "Task", "check", "get", "register", "run"]


def register(
    name: str, summary: str, *, paper: str, reads: Literal["all", "part", "none"], **declared: Any
) -> Callable[[Callable[..., ForgetReport | None]], Callable[..., ForgetReport | None]]:
    """A decorator that adds ``(task, **settings)`` as a method under ``name``: see `distruction.registry`.

    Args:
        summary, paper, reads, declared: the attributes of `Method`.

    Raises:
        UsageError: the name is taken.
    """

    def add(function: Callable[..., ForgetReport | None]) -> Callable[..., ForgetReport | None]:
        REGISTRY.add(name, Method(summary, paper, function, reads, **declared))
        return function

    return add


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    return REGISTRY.known(name)


def check(name: str, settings: dict[str, Any]) -> None:
    """Raise `UsageError` unless the method exists and takes settings of these names."""
    parameters = list(inspect.signature(get(name).run).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        parameters += inspect.signature(forget_with).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for setting in settings:
        if setting not in known:
            raise UsageError(f"method {name} has no setting {setting!r}; it has {', '.join(known) or 'none'}")


def run(name: str, task: Task, **settings: Any) -> ForgetReport | None:
    """Let a method unlearn ``task.forget`` from ``task.model``, seeded by ``task.seed`` and nothing else.

    Raises:
        UsageError: the method or a setting is unknown, or the task lacks the posterior that it needs.
    """
    check(name, settings)
    method = get(name)
    if len(task.forget) == 0:
        raise UsageError("the forget set is empty, so there is nothing to forget")
    if method.needs_posterior:
        _ = task.prior
    devices = [next(task.model.parameters()).device] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=[d for d in devices if d.type == "cuda"]):
        torch.manual_seed(task.seed)
        result = method.run(task, **settings)
    task.model.eval()
    return result
