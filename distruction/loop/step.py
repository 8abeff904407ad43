"""What a run tells after each step, and what may change it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

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
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    kl: float
    kl_weight: float
    probability: float | None = None

    def __str__(self) -> str:
        told = [f"loss {self.loss:.3f}"]
        if self.probability is not None:
            told.append(f"probability {self.probability:.2g}")
        if self.kl or self.kl_weight:
            told += [f"KL {self.kl:.1f}", f"lambda {self.kl_weight:.2g}"]
        return " ".join(told)


class Terminated(BaseException):
    """Raised by a callback: the process is to end now, after a checkpoint."""


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
