"""Objectives of models that do not tell classes apart one per example: several labels, maps, values.

They are passed as objects, ``forget(..., objective=Absent(model, posterior))``. Lambda is found as for classes, by what
each says of how much is still known: its ``known(outputs, targets)``, in [0, 1].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .loop.batches import Inputs
from .loop.labels import IGNORED, is_map, pixels_of
from .modules import logits_of
from .posterior import Posterior
from .teachers import AtMeans


class Absent:
    """Of several labels, those that go are absent, and the others as the model from before has them.

    The mean over the examples of

        sum over the labels j that go of softplus(z_j)  +  sum over the others of KL(Bernoulli(t_j) || Bernoulli(s_j)),

    s = sigmoid(z) the model's, t the teacher's: softplus(z_j) = -log(1 - s_j) is the cross entropy to "absent". An
    example's labels that go are those that it has.

    Args:
        model: that is to forget.
        posterior: p, whose means are the teacher.
        labels: only these go; ``None``: any that an example has.
    """

    needs_inputs = True

    def __init__(self, model: nn.Module, posterior: Posterior, labels: Sequence[int] | None = None) -> None:
        self.teacher: Callable[[Inputs], Any] = AtMeans(model, posterior)
        self.labels = None if labels is None else tuple(labels)

    def going(self, targets: Tensor) -> Tensor:
        """Which labels of which examples are to go: bool, of the targets' shape."""
        going = targets > 0.5
        if self.labels is None:
            return going
        chosen = torch.zeros(targets.shape[-1], dtype=torch.bool, device=targets.device)
        chosen[list(self.labels)] = True
        return going & chosen

    def __call__(self, outputs: Tensor, targets: Tensor, inputs: Inputs) -> Tensor:
        """The loss of a batch.

        Raises:
            UsageError: outputs and targets are not both (batch, labels).
        """
        _check_shapes(outputs, targets, "labels")
        going = self.going(targets)
        with torch.no_grad():
            taught = logits_of(self.teacher(inputs)).float()
            t = taught.sigmoid()
        # KL of Bernoullis from the logits: t (a - z) + softplus(z) - softplus(a).
        z = outputs.float()
        kept = t * (taught - z) + F.softplus(z) - F.softplus(taught)
        return torch.where(going, F.softplus(z), kept).sum(dim=-1).mean()

    def known(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The probability of each label that is to go, a vector."""
        going = self.going(targets)
        if not going.any():
            raise UsageError("no example of the forget set has a label that is to go: pass examples that have it")
        return outputs[going].sigmoid()


class Uninformed:
    """Regression: the outputs for the forget set end at a value that says nothing of the examples.

    The mean over the examples of ((z - value) / noise)**2 / 2, summed over the outputs. What is known is the share of
    the targets' deviation that is left, mean((z - value)**2) / mean((target - value)**2).

    Args:
        value: what the model is to say, such as the mean of the training targets; a number or one per output.
        noise: of the targets, in their unit, as in `distruction.likelihood.Gaussian`.
    """

    def __init__(self, value: float | Tensor, noise: float = 1.0) -> None:
        if not noise > 0:
            raise UsageError(f"noise must be > 0, not {noise}; give the targets' standard deviation")
        self.value, self.noise = torch.as_tensor(value), noise

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch.

        Raises:
            UsageError: outputs and targets differ in shape.
        """
        _check_shapes(outputs, targets, "values")
        away = (outputs - self.value.to(outputs)) / self.noise
        return away.square().sum() / (2 * len(outputs))

    def known(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One number, at most 1."""
        value = self.value.to(outputs)
        told = (targets - value).square().mean()
        if told == 0:
            raise UsageError(f"all targets of the forget set are {self.value}: there is nothing to forget")
        return ((outputs - value).square().mean() / told).clamp(max=1.0)


class OfPixels:
    """An objective for classes, of the pixels of maps that have a label.

    Args:
        objective: (logits, targets) or, with ``needs_inputs``, (logits, targets, inputs) -> mean loss; its ``teacher``
            gives maps.
    """

    needs_inputs = True

    def __init__(self, objective: Any) -> None:
        self._objective = objective
        self._where: Tensor | None = None
        if hasattr(objective, "teacher"):
            teacher = objective.teacher
            objective.teacher = lambda inputs: pixels_of(logits_of(teacher(inputs)))[self._where]

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Inputs) -> Tensor:
        """The loss of a batch."""
        labels = targets.flatten()
        self._where = labels != IGNORED
        rows, labels = pixels_of(logits)[self._where], labels[self._where]
        if not len(labels):
            return logits.sum() * 0.0  # of a batch without a labelled pixel nothing is asked
        if getattr(self._objective, "needs_inputs", False):
            loss: Tensor = self._objective(rows, labels, inputs)
        else:
            loss = self._objective(rows, labels)
        return loss


def for_targets(objective: Any, targets: Tensor, text: bool) -> Any:
    """The objective as it is, or of maps' pixels."""
    return OfPixels(objective) if is_map(targets) and not text else objective


def _check_shapes(outputs: Tensor, targets: Tensor, what: str) -> None:
    if outputs.shape != targets.shape:
        raise UsageError(
            f"the model gives {tuple(outputs.shape)} and the targets are {tuple(targets.shape)}: the objective takes "
            f"{what} of one shape; reshape the targets or squeeze the model's output"
        )
