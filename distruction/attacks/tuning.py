"""Attacks that train the model again."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import metrics
from ..data import Examples, loader
from ..errors import UsageError
from ..modules import deterministic, logits_of
from ..seeds import seed_of
from .attacker import DRAWS, check_counts, few, unchanged


def few_shot(
    model: nn.Module,
    forget: Examples,
    probe: Examples,
    *,
    shots: int = 5,
    steps: int = 20,
    lr: float = 1e-4,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """Accuracy on ``probe`` after ``steps`` of Adam on the same ``shots`` examples of each forgotten class.

    In eval mode (no dropout, frozen BatchNorm statistics); the mean over ``draws`` of the examples.

    Args:
        forget: what the examples are drawn from, without replacement.
        probe: unseen examples of the forgotten classes.

    Raises:
        UsageError: an argument is out of range, or a set is empty.
    """
    check_counts(shots=shots, steps=steps, draws=draws)
    if len(forget) == 0 or len(probe) == 0:
        raise UsageError("the forget set and the probe must hold examples to attack with")
    labels = forget[list(range(len(forget)))][1].cpu()
    found = []
    for draw in range(draws):
        batch = forget[few(labels, shots, seed, draw).tolist()]
        with unchanged(model):
            _fine_tune(model, [batch] * steps, lr)
            found.append(metrics.accuracy(*metrics.predict(model, loader(probe, batch_size=512))))
    return float(np.mean(found))


def relearn(
    model: nn.Module,
    retain: Examples,
    probe: Examples,
    *,
    steps: int = 100,
    lr: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> float:
    """Accuracy on ``probe``, of the forgotten, after ``steps`` of Adam on ``retain`` alone: what comes back by itself.

    Raises:
        UsageError: an argument is out of range, or a set is empty.
    """
    check_counts(steps=steps, batch_size=batch_size)
    if len(retain) == 0 or len(probe) == 0:
        raise UsageError("the retained data and the probe must hold examples to attack with")
    generator = torch.Generator().manual_seed(seed_of(seed, 8))
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += torch.randperm(len(retain), generator=generator).tolist()
    with unchanged(model):
        _fine_tune(model, (retain[order[i * batch_size : (i + 1) * batch_size]] for i in range(steps)), lr)
        return metrics.accuracy(*metrics.predict(model, loader(probe, batch_size=512)))


def _fine_tune(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], lr: float) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    with deterministic(model):
        for x, y in batches:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits_of(model(x.to(device))), y.to(device)).backward()
            optimizer.step()
