"""Class numbers in a model's range, one of each example or one of each pixel, checked in every batch on the device."""

import torch
from torch import Tensor

from ..errors import UsageError
from .loaders import Role

IGNORED = -100
"""The label of a pixel that has none, as in `torch.nn.functional.cross_entropy`."""
AT_ONCE = ["cpu"]
"""Types of devices that the host may ask at any time without waiting."""


def answers_at_once(device: torch.device) -> bool:
    """Whether the host may read a tensor on ``device`` at any time without waiting."""
    return device.type in AT_ONCE


def is_map(targets: Tensor) -> bool:
    """Whether the targets are class numbers of pixels, (batch, ...)."""
    return targets.ndim > 1 and not targets.is_floating_point() and not targets.is_complex()


def as_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels as examples: (pixels, classes) and (pixels,) of logits (batch, classes, ...) and labels (batch, ...).

    Without those that are labelled `IGNORED`. Of one label per example both are as they were.
    """
    if not is_map(targets):
        return logits, targets
    labels = targets.flatten()
    where = labels != IGNORED
    return pixels_of(logits)[where], labels[where]


def pixels_of(logits: Tensor) -> Tensor:
    """(batch, classes, ...) as (pixels, classes)."""
    return logits.movedim(1, -1).flatten(0, -2)


class Labels:
    """The targets of a step's batch as class numbers.

    On the CPU a label out of range is refused before it is used. Elsewhere the host does not wait for the answer: the
    labels are clamped, so that no kernel indexes out of bounds, and `check` says at the end of the step what was found.

    Raises:
        UsageError: they are no int64.
    """

    def __init__(self, targets: Tensor, role: Role, step: int) -> None:
        if targets.dtype.is_floating_point or targets.dtype.is_complex:
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
        """The labels, clamped to the classes of ``logits``, (batch, classes) or of maps (batch, classes, ...).

        Raises:
            UsageError: the labels are maps, and the logits are none of the same size.
        """
        maps = is_map(self._targets)
        if maps and (logits.ndim != self._targets.ndim + 1 or logits.shape[2:] != self._targets.shape[1:]):
            raise UsageError(
                f"targets of {self._role.name} must be a vector of int64 class numbers, or maps of them of the size of "
                f"the model's: it gives {tuple(logits.shape)}, (batch, classes, ...), for targets "
                f"{tuple(self._targets.shape)}, (batch, ...); several labels and values want a likelihood"
            )
        if not maps and (logits.ndim != 2 or logits.shape[-1] == 1):
            return self._targets  # no classes to speak of; the loss function knows
        left_out = self._targets == IGNORED if maps else torch.zeros_like(self._targets, dtype=torch.bool)
        if self._range is None:
            self._classes = logits.shape[1]
            known = self._targets.masked_fill(left_out, 0)
            self._range = (known.amin(), known.amax())
            if answers_at_once(logits.device):
                self.check(*(t.item() for t in self._range))
        return self._targets.clamp(0, self._classes - 1).masked_fill(left_out, IGNORED)

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
