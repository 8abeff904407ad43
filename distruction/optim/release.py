"""Gradients that the backward pass takes and drops, one parameter after another."""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UsageError

if TYPE_CHECKING:
    from .bgd import BGD

Part = tuple[Tensor, Tensor, Tensor | None]
"""A parameter, the counters after its part of the call, and its KL."""


class Released:
    """What backward has taken of a group.

    Attributes:
        pending: since the last step.
        last: before it, to say which parameter an update was refused for.
    """

    def __init__(self) -> None:
        self.pending: list[Part] = []
        self.last: list[Part] = []

    def take(self) -> list[Part]:
        """What is pending, which a step then has dealt with."""
        self.last, self.pending = self.pending, []
        return self.last


def release_from(optimizer: "BGD", index: int) -> None:
    """Let ``backward`` take and drop the gradients of a group, as long as the optimizer lives."""
    reference = weakref.ref(optimizer)

    def release(p: Tensor) -> None:
        alive = reference()
        if alive is not None and alive._training:
            with torch.no_grad():
                alive._release(index, p)

    params = [p for p in optimizer.param_groups[index]["params"] if p.is_leaf]
    frozen = [p for p in params if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)  # torch hooks only what requires a gradient; it may do so later
    handles = [p.register_post_accumulate_grad_hook(release) for p in params]
    for p in frozen:
        p.requires_grad_(False)
    weakref.finalize(optimizer, lambda: [handle.remove() for handle in handles])


def check_first(released: Released, p: Tensor) -> None:
    """Refuse a second backward pass before a step."""
    if any(p is q for q, _, _ in released.pending):
        raise UsageError(
            "a second backward pass reached a parameter before step(): with release_gradients each backward pass "
            "is one Monte Carlo sample, so call step() after each; to accumulate gradients use "
            "release_gradients=False"
        )
