"""Fine-tuning on the retain set and hoping to forget."""

import torch
import torch.nn.functional as F

from ..data import loader
from ..modules import learnable
from .base import Method, Task, fit


def finetune(
    task: Task,
    *,
    epochs: int = 5,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 64,
) -> None:
    """SGD on the retain set alone, starting from the trained model."""
    optimizer = torch.optim.SGD(learnable(task.model).values(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    for _ in range(epochs):
        batches = loader(task.retain, batch_size=batch_size, shuffle=True)
        fit(task.model, batches, lambda logits, targets, inputs: F.cross_entropy(logits, targets), optimizer)


METHOD = Method(
    "train on with the retain set only",
    "Golatkar, Achille, Soatto 2020, https://arxiv.org/abs/1911.04933 (as a baseline)",
    finetune,
    reads="all",
    sweep="lr",
)
