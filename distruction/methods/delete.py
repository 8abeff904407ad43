"""DELETE: distil the old model's own prediction with the true class masked out, on the forget set alone.

Zhou, Zheng, Mo, Lu, Lin, Zheng, "Decoupled Distillation to Erase: A General Unlearning Method for Any Class-centric
Tasks", CVPR 2025, arXiv 2503.23751. With the KL penalty beside it, it is ``distruction`` with the objective
``masked-teacher``.
"""

import copy

import torch

from ..data import loader
from ..modules import learnable
from ..objectives import MaskedTeacher
from .base import Method, Task, fit


def delete(task: Task, *, epochs: int = 10, lr: float = 0.01, batch_size: int = 128) -> None:
    """SGD with momentum 0.9, as published."""
    loss = MaskedTeacher(copy.deepcopy(task.model))
    optimizer = torch.optim.SGD(learnable(task.model).values(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        fit(task.model, loader(task.forget, batch_size=batch_size, shuffle=True), loss, optimizer)


METHOD = Method(
    "the old model's own prediction without the true class, distilled on the forget set alone",
    "Zhou, Zheng, Mo, Lu, Lin, Zheng 2025, https://arxiv.org/abs/2503.23751",
    delete,
    reads="none",
    sweep="lr",
    scenarios=("full-class", "sub-class"),
)
