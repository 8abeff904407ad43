"""Plain training of a classifier: the baseline to unlearn from, and retraining to compare with."""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from .augment import augment
from .data import Examples, loader
from .errors import NonFiniteError, UsageError


def train(
    model: nn.Module,
    data: Examples,
    *,
    epochs: int = 40,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    noise: float = 0.4,
    crop: int = 0,
    flip: bool = False,
    rotation: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train ``model`` in place with AdamW, a one-cycle schedule and cross entropy; it ends in eval mode.

    Args:
        noise: std of the Gaussian noise added to the normalised images.
        crop, flip, rotation: see `augment.augment`.
        seed: of the batches' order, the noise, the augmentation and dropout.

    Raises:
        UsageError: the data is empty.
        NonFiniteError: the loss became NaN or infinite.
    """
    if len(data) == 0:
        raise UsageError("the training set is empty, so there is nothing to train on")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    total = math.ceil(len(data) / batch_size) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=0.1)

    def perturb(inputs: Tensor) -> Tensor:
        inputs = augment(inputs, crop=crop, flip=flip, rotation=rotation)
        return inputs + noise * torch.randn_like(inputs)

    _epochs(
        model,
        data,
        optimizer,
        epochs=epochs,
        batch_size=batch_size,
        perturb=perturb,
        after_step=schedule.step,
        seed=seed,
        progress=progress,
    )


def train_sgd(
    model: nn.Module,
    data: Examples,
    *,
    epochs: int = 8,
    milestones: Sequence[int] = (7,),
    batch_size: int = 64,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    decay: float = 0.2,
    crop: int = 0,
    flip: bool = False,
    rotation: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train ``model`` in place with SGD, whose step size is multiplied by ``decay`` after each milestone's epoch.

    The recipe of Foster, Schoepf, Brintrup 2024 for a pretrained ViT; it ends in eval mode.

    Args:
        crop, flip, rotation: see `augment.augment`.
        seed: of the batches' order, the augmentation and dropout.

    Raises:
        UsageError: the data is empty.
        NonFiniteError: the loss became NaN or infinite.
    """
    if len(data) == 0:
        raise UsageError("the training set is empty, so there is nothing to train on")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), gamma=decay)
    _epochs(
        model,
        data,
        optimizer,
        epochs=epochs,
        batch_size=batch_size,
        perturb=functools.partial(augment, crop=crop, flip=flip, rotation=rotation),
        after_epoch=schedule.step,
        seed=seed,
        progress=progress,
    )


def _epochs(
    model: nn.Module,
    data: Examples,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    perturb: Callable[[Tensor], Tensor],
    after_step: Callable[[], None] = lambda: None,
    after_epoch: Callable[[], None] = lambda: None,
    seed: int,
    progress: bool,
) -> None:
    device = next(model.parameters()).device
    batches = loader(data, batch_size=batch_size, shuffle=True)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for epoch in track(range(epochs), "train", disable=not progress, transient=True):
            for inputs, targets in batches:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(perturb(inputs.to(device))), targets.to(device))
                if not torch.isfinite(loss):
                    lr = optimizer.param_groups[0]["lr"]
                    raise NonFiniteError(f"the loss is {loss.item()} in epoch {epoch + 1}; lower lr (now {lr:g})")
                loss.backward()
                optimizer.step()
                after_step()
            after_epoch()
    model.eval()


RECIPES: dict[str, Callable[..., None]] = {"adamw-onecycle": train, "sgd-milestones": train_sgd}
"""Training recipes by name: ``(model, data, *, seed, progress, **settings)``."""
