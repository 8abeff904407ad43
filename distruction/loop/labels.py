"""Class numbers in a model's range, checked in every batch on the device."""

import torch
from torch import Tensor

from ..errors import UsageError
from .loaders import Role

AT_ONCE = ["cpu"]
"""Types of devices that the host may ask at any time without waiting."""


def answers_at_once(device: torch.device) -> bool:
    """Whether the host may read a tensor on ``device`` at any time without waiting."""
    return device.type in AT_ONCE


class Labels:
    """The targets of a step's batch as class numbers.

    On the CPU a label out of range is refused before it is used. Elsewhere the host does not wait for the answer: the
    labels are clamped, so that no kernel indexes out of bounds, and `check` says at the end of the step what was found.

    Raises:
        UsageError: they are not a vector of int64.
    """

    def __init__(self, targets: Tensor, role: Role, step: int) -> None:
        if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.ndim != 1:
            raise UsageError(
                f"targets of {role.name} must be a vector of int64 class numbers, not {targets.dtype} "
                f"{tuple(targets.shape)}"
            )
        self._targets = targets.long()
        self._role = role
        self._step = step
        self._classes = 0
        self._range: tuple[Tensor, Tensor] | None = None

    def within(self, logits: Tensor) -> Tensor:
        """The labels, clamped to the classes of ``logits`` (batch, classes)."""
        if logits.ndim != 2 or logits.shape[-1] == 1:
            return self._targets  # no classes to speak of; the loss function knows
        if self._range is None:
            self._classes = logits.shape[-1]
            self._range = (self._targets.amin(), self._targets.amax())
            if answers_at_once(logits.device):
                self.check(*(t.item() for t in self._range))
        return self._targets.clamp(0, self._classes - 1)

    def found(self) -> list[Tensor]:
        """The smallest and the largest label, as scalars on the device, where there are classes."""
        return [] if self._range is None else list(self._range)

    def check(self, low: float | None = None, high: float | None = None) -> None:
        """Refuse what `found` has found, once it is here.

        Raises:
            UsageError: a label is out of range.
        """
        if low is not None and high is not None and (low < 0 or high >= self._classes):
            raise UsageError(
                f"the labels run from {int(low)} to {int(high)}, in the batch of step {self._step}, but the model has "
                f"{self._classes} classes (0 to {self._classes - 1}); {self._role.name} is not part of its label space"
            )
