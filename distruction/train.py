"""Plain training of a classifier: the baseline to unlearn from, and retraining to compare with."""

import math

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

from .data import Images, loader
from .errors import NonFiniteError, UsageError


def train(
    model: nn.Module,
    data: Images,
    *,
    epochs: int = 40,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    noise: float = 0.4,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train ``model`` in place with AdamW, a one-cycle schedule and cross entropy; it ends in eval mode.

    Args:
        noise: std of the Gaussian noise added to the normalised images.
        seed: of the batches' order, the noise and dropout.

    Raises:
        UsageError: the data is empty.
        NonFiniteError: the loss became NaN or infinite.
    """
    if len(data) == 0:
        raise UsageError("the training set is empty, so there is nothing to train on")
    device = next(model.parameters()).device
    batches = loader(data, batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    total = math.ceil(len(data) / batch_size) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=0.1)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for epoch in track(range(epochs), "train", disable=not progress, transient=True):
            for inputs, targets in batches:
                inputs = inputs.to(device)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs + noise * torch.randn_like(inputs)), targets.to(device))
                if not torch.isfinite(loss):
                    raise NonFiniteError(f"the loss is {loss.item()} in epoch {epoch + 1}; lower lr (now {lr})")
                loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()
