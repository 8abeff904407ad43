"""Amnesiac unlearning: train on with the forget set under wrong labels.

Graves, Nagisetty, Ganesh, "Amnesiac Machine Learning", AAAI 2021, arXiv 2010.10981 (the relabelling variant).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import loader
from ..forget_report import ForgetReport
from ..modules import learnable
from .base import Method, Mixed, Task, fit, forget_with


def other_labels(labels: Tensor, num_classes: int) -> Tensor:
    """For each label one of the other classes, drawn uniformly from the global generator."""
    return (labels + torch.randint(1, num_classes, labels.shape)) % num_classes


def amnesiac(task: Task, *, epochs: int = 3, lr: float = 1e-4, batch_size: int = 128) -> None:
    """Adam on the forget set, relabelled once, together with the retain set."""
    relabelled = other_labels(task.forget.labels, task.num_classes)
    data = Mixed((task.forget, relabelled), (task.retain, task.retain.labels))
    optimizer = torch.optim.Adam(learnable(task.model).values(), lr=lr)
    for _ in range(epochs):
        batches = loader(data, batch_size=batch_size, shuffle=True)
        fit(task.model, batches, lambda logits, targets, inputs: F.cross_entropy(logits, targets), optimizer)


def amnesiac_kl(task: Task, **settings: Any) -> ForgetReport:
    """BGD on the relabelled forget set; the KL penalty stands for the retain set.

    ``settings`` are those of `base.forget_with`.
    """
    relabelled = other_labels(task.forget.labels, task.num_classes)
    return forget_with(task, F.cross_entropy, Mixed((task.forget, relabelled)), **settings)


PAPER = "Graves, Nagisetty, Ganesh 2021, https://arxiv.org/abs/2010.10981"
METHOD = Method("random wrong labels for the forget set, beside the retain set", PAPER, amnesiac, "all", sweep="lr")
WITH_KL = Method(
    "random wrong labels for the forget set, the KL penalty for the rest",
    PAPER,
    amnesiac_kl,
    reads="none",
    needs_posterior=True,
    sweep="kl_weight",
)
