"""Forgetting in depth: not the logits of a class alone go, but what its examples share in front of the classifier.

A model may give a class no probability and still put its examples into one place, where a few labelled ones find it
again. With the penultimate features f of a batch, ``depth="features"`` minimises

    U + (S / R) c,    c = mean cosine similarity of the pairs of f with one label

so that they disperse among the other classes' (the idea is Spotter's, 2026). With R data points that U weighs against
the posterior (`distruction.strength`), c weighs S, whatever R is: each is the multiplier of a constraint of its own. S
is found as R is, so that c, *at the means*, ends at its level:

    log S += rate * clip((c - aim) / scale, -2, 2)    after each step,

not raised while c is falling by itself, at rates that follow the step size down in each cycle. The two constraints pull
at the same weights, so that all goes more slowly than for the logits alone: longer cycles, smaller steps. They must not
contradict each other: an objective that says how likely each class is to become, as the old model's next guesses, draws
together the many that have the same ones. And what is dispersed must end where the other classes are, not between them,
which is a place of its own again. Hence ``plausible-others`` here by default: any one class that the old model finds
plausible.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .errors import UsageError
from .features import Features, mean_cosine
from .loop import Step, cosine
from .optim import BGD
from .strength import LONG_CYCLE, STEPS_BETWEEN_LOOKS, DualAscent, Probability

OBJECTIVE = "plausible-others"
"""U where none is named."""
COSINE = 0.25
"""Mean cosine at which the features of a class count as dispersed."""
SPEED, PACE = 0.5, 0.25
"""Factor of the step size at the start of a cycle, and the ascents' least one."""
MARGIN, SCALE, FALLING, CLIP = 0.05, 0.1, 0.02, 2.0
"""The ascent aims so far under the level; the difference that counts as 1; by what c falls where it falls by itself."""
RATE = 0.03
START, LEAST, MOST = 1000.0, 1.0, 1e5
"""S at the start, and its bounds, in data points."""


def cosine_asked(depth: str | None, level: float | None, classifier: str | None) -> float:
    """The mean cosine to end at, of arguments that fit each other.

    Raises:
        UsageError: they do not.
    """
    if depth not in (None, "features"):
        raise UsageError(f"depth must be 'features' or None, not {depth!r}")
    if depth is None and not (level is None and classifier is None):
        raise UsageError("cosine_level and classifier are for depth='features': pass that too, or leave them out")
    if level is not None and not -1 < level < 1:
        raise UsageError(f"cosine_level must be a cosine in (-1, 1), not {level}")
    return COSINE if level is None else level


class Dispersed:
    """An objective with the dispersion term: ``(logits, targets, inputs) -> loss``.

    Args:
        objective: U, of logits, targets and inputs.
        features: of the forward pass that gave the logits.

    Attributes:
        weight: S / R.
    """

    def __init__(self, objective: Callable[[Tensor, Tensor, Any], Tensor], features: Features) -> None:
        self._objective, self._features = objective, features
        self.weight = 0.0

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Any) -> Tensor:
        """The loss of a batch."""
        cosine = mean_cosine(self._features.rows.float(), targets)
        return self._objective(logits, targets, inputs) + self.weight * cosine


class DepthAscent:
    """Steers S so that the mean cosine ends at ``level`` (a `distruction.loop.Controller`).

    Args:
        objective: whose ``weight`` it sets.
        probability: looks at the model, with the features (`distruction.strength.Probability`).
        level: in (-1, 1), what the mean cosine should be at most.
        strength: the ascent of lambda, whose looks it shares; ``None`` where lambda is given, and it looks itself.
        cycle: steps in which the step size decays to zero.

    Attributes:
        value: c at the last look.
        log_points: log S.
    """

    def __init__(
        self,
        objective: Dispersed,
        probability: Probability,
        *,
        level: float,
        strength: DualAscent | None,
        cycle: int = LONG_CYCLE,
    ) -> None:
        self._objective, self._probability, self._strength = objective, probability, strength
        self.level, self._aim, self._cycle = level, level - MARGIN, cycle
        self.value = self._before = 1.0
        self.log_points = math.log(START)

    @property
    def at_bound(self) -> bool:
        """Whether S is at its upper bound."""
        return self.log_points >= math.log(MOST)

    def advice(self, done: int, steps: int) -> str:
        """What to do where the level is not reached."""
        if done < steps:
            return "the callback ended the run before the features were dispersed: let it go on"
        more = "choose a higher cosine_level" if self.at_bound else "allow more steps, or choose a higher cosine_level"
        return f"the features' mean cosine is {self.value:.2f}, above {self.level:g}: {more}"

    @property
    def reached(self) -> bool:
        """Whether the level held at the last look."""
        return self.value <= self.level

    def before_step(self, optimizer: BGD, history: list[Step]) -> None:
        """Set the weights of the objective and of the cosine."""
        if self._strength is not None:
            self._strength.before_step(optimizer, history)
        group = optimizer.param_groups[0]
        weight, data = group["kl_weight"], group["data_per_step"]
        points = data * (1 - weight) / weight if weight > 0 else data
        self._objective.weight = math.exp(self.log_points) / points if points > 0 else 0.0

    def after_step(self, optimizer: BGD, history: list[Step]) -> bool:
        """One step of both ascents; whether both levels hold at the end of a cycle."""
        settled = self._strength is not None and self._strength.after_step(optimizer, history)
        if len(history) % self._cycle == 0 or len(history) % STEPS_BETWEEN_LOOKS == 0:
            if self._strength is None:
                self._probability()
            self._before, self.value = self.value, self._probability.cosine
        pace = cosine((len(history) - 1) % self._cycle, self._cycle)
        excess = min(max((self.value - self._aim) / SCALE, -CLIP), CLIP)
        if excess < 0 or self.value > self._before - FALLING:
            self.log_points += pace * RATE * excess
        self.log_points = min(max(self.log_points, math.log(LEAST)), math.log(MOST))
        return settled and self.reached

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "log_points": self.log_points,
            "value": self.value,
            "value_before": self._before,
            "strength": None if self._strength is None else self._strength.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.log_points, self.value = state["log_points"], state["value"]
        self._before = state["value_before"]
        if self._strength is not None:
            self._strength.load_state_dict(state["strength"])
