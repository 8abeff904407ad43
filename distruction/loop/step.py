"""What a run tells after each step, and what may change it."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..optim import BGD


@dataclass(frozen=True)
class Step:
    """What a callback learns of one step.

    Attributes:
        step: steps done, from 1 to ``steps``.
        steps: steps of the whole run.
        loss: mean loss over the batch, averaged over the Monte Carlo samples; in `forget`, of the objective alone.
        accuracy: percentage of the batch whose label the sampled models still predict; NaN where targets are no
            labels.
        kl: KL(q || p) in nats after the step; 0 while preparing.
        kl_weight: lambda in force; 0 while preparing.
        probability: mean probability of what is to be forgotten at the means, when it was last measured; ``None``
            where it is not.
        accuracy_at_means: the percentage at the means before the step, where it is looked at: in the last tenth of a
            preparation; else ``None``.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    kl: float
    kl_weight: float
    probability: float | None = None
    accuracy_at_means: float | None = None

    def __str__(self) -> str:
        told = [f"loss {self.loss:.3f}"]
        if self.probability is not None:
            told.append(f"probability {self.probability:.2g}")
        if self.kl or self.kl_weight:
            told += [f"KL {self.kl:.1f}", f"lambda {self.kl_weight:.2g}"]
        return " ".join(told)


class Terminated(BaseException):
    """Raised by a callback: the process is to end now, after a checkpoint."""


def require_count(name: str, value: object, least: int = 1) -> int:
    """The value as Python's integer, unless it is no whole number >= ``least``.

    Raises:
        UsageError: names it.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be an integer >= {least}, not {value!r}")
    return int(value)


def require_seed(seed: object) -> int:
    """The seed as Python's integer.

    Raises:
        UsageError: it is none of 64 bits with a sign.
    """
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not -(2**63) <= int(seed) < 2**63:
        raise UsageError(f"seed must be an integer of 64 bits, signed, not {seed!r}")
    return int(seed)


def asks_to_stop(answer: Any) -> bool:
    """Whether a callback's answer is ``True``, also as a comparison of NumPy's or PyTorch's numbers gives it."""
    is_truth = isinstance(answer, np.bool_) or (
        isinstance(answer, Tensor) and answer.dtype == torch.bool and answer.numel() == 1
    )
    return bool(answer) if is_truth else answer is True


Callback = Callable[[Step], Any]
"""Called after each step; where it returns ``True`` the run ends there and keeps what it has reached. On several ranks
one that says so ends it for all. An exception leaves the run without a result."""


class Controller(Protocol):
    """Steers a run by what it has seen so far; its state is kept in checkpoints."""

    def before_step(self, optimizer: BGD, history: list[Step]) -> None:
        """May set the options of the optimizer's groups."""

    def after_step(self, optimizer: BGD, history: list[Step]) -> bool:
        """Whether the run is done; the model holds the means of the step that ``history`` ends with."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
