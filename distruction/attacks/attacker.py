"""What attacks have in common: the attacker's few examples, and a model that ends as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..seeds import seed_of

DRAWS = 5
"""Draws of the attacker's few examples whose results are averaged."""


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside to the model's parameters, gradients and buffers, outside they are as they were."""
    held = {t: t.detach().clone() for t in (*model.parameters(), *model.buffers())}
    gradients = {p: p.grad for p in model.parameters()}
    for p in gradients:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for t, values in held.items():
                t.copy_(values)
        for p, gradient in gradients.items():
            p.grad = gradient


def few(labels: Tensor, shots: int, seed: int, draw: int) -> Tensor:
    """Positions of ``shots`` examples of each label, or of all where it has fewer, ascending."""
    generator = torch.Generator().manual_seed(seed_of(seed, 9, draw))
    keys = torch.rand(len(labels), generator=generator)
    chosen = []
    for c in sorted(set(labels.tolist())):
        where = (labels == c).nonzero().squeeze(-1)
        chosen.append(where[keys[where].argsort()[:shots]])
    return torch.cat(chosen).sort().values


def check_counts(**counts: int) -> None:
    """Raise `UsageError` unless all are integers >= 1."""
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"{name} must be an integer >= 1, not {count!r}")
