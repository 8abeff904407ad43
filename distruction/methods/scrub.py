"""SCRUB: move away from the old model on the forget set, stay close to it on the retain set.

Kurmanji, Triantafillou, Hayes, Triantafillou, "Towards Unbounded Machine Unlearning", NeurIPS 2023, arXiv 2302.09880.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import loader
from ..forget_report import ForgetReport
from ..modules import learnable
from ..objectives import Distillation
from .base import Method, Task, fit, forget_with


def distance(teacher: nn.Module, temperature: float, sign: float = 1.0) -> Distillation:
    """T**2 * KL(teacher || student) at temperature T, the mean over the batch, times ``sign``."""
    return Distillation(teacher, temperature=temperature, weight=sign * temperature**2)


def scrub(
    task: Task,
    *,
    epochs: int = 10,
    max_epochs: int = 3,
    lr: float = 5e-4,
    decay: float = 0.1,
    decay_epochs: Sequence[int] = (5, 8, 9),
    gamma: float = 1.0,
    alpha: float = 0.5,
    temperature: float = 2.0,
    forget_batch: int = 64,
    retain_batch: int = 128,
) -> None:
    """Adam: a max step on the forget set in the first epochs, a min step on the retain set in all of them.

    The max step maximises the distance to the old model; the min step minimises gamma * cross entropy + alpha *
    distance.

    Args:
        max_epochs: epochs with a max step (the paper's msteps).
        decay_epochs: lr is multiplied by ``decay`` after each of these epochs.
    """
    teacher = copy.deepcopy(task.model)
    away, close = distance(teacher, temperature, -1.0), distance(teacher, temperature)
    optimizer = torch.optim.Adam(learnable(task.model).values(), lr=lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(decay_epochs), gamma=decay)

    def min_loss(logits: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        return gamma * F.cross_entropy(logits, targets) + alpha * close(logits, targets, inputs)

    for epoch in range(epochs):
        if epoch < max_epochs:
            fit(task.model, loader(task.forget, batch_size=forget_batch, shuffle=True), away, optimizer)
        fit(task.model, loader(task.retain, batch_size=retain_batch, shuffle=True), min_loss, optimizer)
        schedule.step()


def scrub_kl(task: Task, *, temperature: float = 2.0, **settings: Any) -> ForgetReport:
    """BGD that maximises the distance to the old model on the forget set; the KL penalty stands for the min step.

    The distance has no upper bound, so that ``steps`` and ``kl_weight`` must end it. ``settings`` are those of
    `base.forget_with`.
    """
    away = distance(copy.deepcopy(task.model), temperature, -1.0)
    return forget_with(task, away, task.forget, **settings)


PAPER = "Kurmanji, Triantafillou, Hayes, Triantafillou 2023, https://arxiv.org/abs/2302.09880"
METHOD = Method(
    "away from the old model on the forget set, close to it on the retain set", PAPER, scrub, "all", sweep="lr"
)
WITH_KL = Method(
    "away from the old model on the forget set, the KL penalty for the rest",
    PAPER,
    scrub_kl,
    reads="none",
    needs_posterior=True,
    sweep="kl_weight",
)
