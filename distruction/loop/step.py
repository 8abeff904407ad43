"""What a callback learns of one step."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What a callback learns of one step.

    Attributes:
        step: steps done, from 1 to ``steps``.
        steps: steps of the whole run.
        loss: mean loss over the batch, averaged over the Monte Carlo samples; in `forget`, of the objective alone.
        accuracy: percentage of the batch whose label the sampled models still predict.
        kl: KL(q || p) in nats after the step; 0 while preparing.
        kl_weight: lambda in force; 0 while preparing.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    kl: float
    kl_weight: float


Callback = Callable[[Step], None]
