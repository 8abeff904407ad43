"""What a call of the ops consists of, from the optimizer to every backend.

The registered ops are flat, as `torch.library` wants them; `distruction.ops` packs and unpacks these types by the
names of their fields, which are those of the schemas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class State:
    """A posterior, what its update has gathered, and its prior: lists with one tensor per parameter.

    Attributes:
        mean, std: float32 (float64 with the reference backend).
        m1, m2: sums of g and g * eps over an update's earlier samples; both empty where there are none. An empty ``m2``
            alone: ``m1`` holds the first gradient of an antithetic pair.
        prior_mean, prior_std: empty where there is no prior.
    """

    mean: Sequence[Tensor]
    std: Sequence[Tensor]
    m1: Sequence[Tensor] = ()
    m2: Sequence[Tensor] = ()
    prior_mean: Sequence[Tensor] = ()
    prior_std: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Draws:
    """Where the generator stands, and how its normals are used.

    Attributes:
        offsets: flat index, in the whole parameter, of the first element of each tensor; 0 but for shards.
        streams: one generator stream per parameter, in [0, 2**32).
        seed: 64-bit key.
        counters: int64 tensor of three: the draw number of the sample that the parameters hold, the Monte Carlo samples
            accumulated since the last update, and 1 once a non-finite update was refused.
        antithetic: draws 2i and 2i + 1 are eps and -eps.
        stochastic_rounding: of bfloat16 parameters.
    """

    offsets: Sequence[int]
    streams: Sequence[int]
    seed: int
    counters: Tensor
    antithetic: bool = False
    stochastic_rounding: bool = False


@dataclass(frozen=True)
class Rule:
    """The BGD update rule; the formulas are in `distruction.ops.reference.step`.

    Attributes:
        lr, kl_weight: scalar tensors, so that a schedule needs no recompilation.
        loss_scale: multiplies the gradient.
        max_mean_step, max_log_std_step: the trust region, in units of std and of its logarithm; infinity for none.
        max_std: the cap of std; infinity for none.
        learn_mean, learn_std: what is updated.
    """

    lr: Tensor
    kl_weight: Tensor
    loss_scale: float
    max_mean_step: float
    max_log_std_step: float
    max_std: float
    learn_mean: bool = True
    learn_std: bool = True

    @property
    def max_a(self) -> float:
        """The bound of a that asinh(a) <= max_log_std_step sets."""
        return math.sinh(self.max_log_std_step) if self.max_log_std_step < 700 else math.inf


@dataclass(frozen=True)
class Amp:
    """Scalars of mixed precision, as `torch.amp.GradScaler` hands them to fused optimizers."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def refuses(self) -> bool:
        """Whether the update is to be left out; waits for the device."""
        return self.found_inf is not None and self.found_inf.item() != 0
