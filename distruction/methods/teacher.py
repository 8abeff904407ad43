"""Bad teacher: an incompetent teacher for the forget set, the old model for the retain set.

Chundawat, Tarun, Mandal, Kankanhalli, "Can Bad Teaching Induce Forgetting?", AAAI 2023, arXiv 2205.08096.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import loader
from ..forget_report import ForgetReport
from ..modules import learnable
from ..objectives import Distillation, divergence
from .base import Method, Mixed, Selected, Task, fit, forget_with


class TwoTeachers:
    """KL(teacher || student) with the incompetent teacher where the flag is 1 and the competent one where it is 0.

    Called ``(logits, flags, inputs)``; the mean over the batch, in nats.
    """

    def __init__(self, incompetent: nn.Module, competent: nn.Module, temperature: float = 1.0) -> None:
        self.incompetent = incompetent.eval().requires_grad_(False)
        self.competent = competent.eval().requires_grad_(False)
        self.temperature = temperature

    def targets(self, flags: Tensor, inputs: Tensor) -> Tensor:
        """Log-probabilities that the student should give, (batch, classes)."""
        with torch.no_grad():
            bad, good = self.incompetent(inputs), self.competent(inputs)
            return F.log_softmax(torch.where(flags[:, None] == 1, bad, good) / self.temperature, dim=-1)

    def __call__(self, logits: Tensor, flags: Tensor, inputs: Tensor) -> Tensor:
        """The loss of a batch."""
        return divergence(logits, self.targets(flags, inputs), self.temperature)


def teacher(
    task: Task,
    *,
    epochs: int = 1,
    lr: float = 1e-4,
    batch_size: int = 128,
    retain_share: float = 0.3,
    temperature: float = 1.0,
) -> None:
    """Adam on the forget set and a random share of the retain set, each taught by its own teacher."""
    loss = TwoTeachers(task.fresh().to(_device(task)), copy.deepcopy(task.model), temperature)
    chosen = torch.randperm(len(task.retain))[: max(1, round(retain_share * len(task.retain)))]
    retain = Selected(task.retain, chosen)
    data = Mixed(
        (task.forget, torch.ones(len(task.forget), dtype=torch.int64)),
        (retain, torch.zeros(len(retain), dtype=torch.int64)),
    )
    optimizer = torch.optim.Adam(learnable(task.model).values(), lr=lr)
    for _ in range(epochs):
        fit(task.model, loader(data, batch_size=batch_size, shuffle=True), loss, optimizer)


def teacher_kl(task: Task, *, temperature: float = 1.0, **settings: Any) -> ForgetReport:
    """BGD with the incompetent teacher as objective; the KL penalty stands for the competent one.

    ``settings`` are those of `base.forget_with`.
    """
    objective = Distillation(task.fresh().to(_device(task)), temperature=temperature)
    return forget_with(task, objective, task.forget, **settings)


def _device(task: Task) -> torch.device:
    return next(task.model.parameters()).device


PAPER = "Chundawat, Tarun, Mandal, Kankanhalli 2023, https://arxiv.org/abs/2205.08096"
METHOD = Method(
    "an incompetent teacher for the forget set, the old model for the rest", PAPER, teacher, "part", sweep="lr"
)
WITH_KL = Method(
    "an incompetent teacher for the forget set, the KL penalty for the rest",
    PAPER,
    teacher_kl,
    reads="none",
    needs_posterior=True,
    sweep="kl_weight",
)
