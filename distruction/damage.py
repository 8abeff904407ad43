"""What a request costs the retained classes, read off rehearsals on the day on which none of their data is left.

`distruction.rehearse` forgets a few mock requests while the data is there, measures their damage on data that the model
has not seen, and keeps numbers: for each the damage, and what can be computed from model, posterior and forget set
alone (`disturbance`). A later request computes the latter again and reads the damage off the rehearsals' line
(`forecast`).

The line goes through the origin: nothing moved, nothing lost. Its error bar has two parts, whose squares add up. One is
the quantile of the errors that the line makes on each rehearsal when it is fitted to the others (the jackknife of
Barber et al., "Predictive inference with the jackknife+", 2021); it holds for a new request as far as that resembles
the rehearsed ones. The other is the chance error of a damage that is counted on so many examples: only those that the
model calls something else than before can count, and their share is read off a line of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loop.batches import Inputs, call
from .modules import deterministic, logits_of
from .posterior import Posterior
from .seeds import seed_of
from .strength import ForgetSet
from .teachers import AtMeans

COVERAGE = 0.8
"""Share of requests that should fall within the error bar."""
NORMAL_QUANTILE = NormalDist().inv_cdf((1 + COVERAGE) / 2)
PROBES = 256
KEY = "rehearsals"
"""Where a posterior's metadata has them."""


@dataclass(frozen=True)
class Rehearsal:
    """One mock request.

    Attributes:
        label: the class that was forgotten.
        objective: with which.
        retained_before, retained: percent of held-out examples of the other classes that the model calls right, before
            and after.
        forgotten: of the class itself, after; ``None`` where no held-out example has it.
        reached: whether the level was reached.
        changed: share of the held-out examples of the other classes that the model calls something else than before.
        examples: how many those are.
        disturbance: see `disturbance`.
    """

    label: int
    objective: str
    retained_before: float
    retained: float
    forgotten: float | None
    reached: bool
    changed: float
    examples: int
    disturbance: dict[str, float]

    @property
    def damage(self) -> float:
        """Points of accuracy that the other classes lost."""
        return self.retained_before - self.retained


@dataclass(frozen=True)
class Forecast:
    """What the rehearsals say of a request.

    Attributes:
        damage: points of accuracy that the retained classes lose.
        error: half the width of the bar around it.
        by: the measure of disturbance that it goes by, the best on the rehearsals.
        rehearsals: how many there were.
    """

    damage: float
    error: float
    by: str
    rehearsals: int

    def __str__(self) -> str:
        return f"{self.damage:.1f} ± {self.error:.1f} points"


def disturbance(
    model: nn.Module, posterior: Posterior, data: ForgetSet, removed: Sequence[int], kl: float, *, seed: int
) -> dict[str, float]:
    """How far a model has moved from the one that its posterior was prepared for, without any retained data.

    Args:
        model: after the request.
        posterior: p; its means are the model before.
        data: of the forget set.
        removed: labels that are gone, which count for neither model.
        kl: KL(q || p) in nats.
        seed: of the probes.

    Returns:
        ``kl``; and for inputs of real numbers, for two kinds of probe, noise with each channel's mean and std over the
        forget set, and means of two records of it: the share of probes whose best remaining class is another than
        before, and the mean KL(before || after) between the distributions over the remaining classes.
    """
    found = {"kl": kl}
    before = AtMeans(model, posterior)
    with deterministic(model), torch.no_grad():
        for name, probes in _probes(data.inputs, seed).items():
            old, new = (_remaining(logits, removed) for logits in (before(probes), logits_of(call(model, probes))))
            found[f"{name}: changed"] = (old.argmax(dim=-1) != new.argmax(dim=-1)).double().mean().item()
            found[f"{name}: divergence"] = F.kl_div(new, old, log_target=True, reduction="none").sum(-1).mean().item()
    return found


def forecast(metadata: Mapping[str, Any], moved: Mapping[str, float]) -> Forecast | None:
    """The damage that a disturbance means by the rehearsals of a posterior; ``None`` without at least three."""
    rehearsals = [Rehearsal(**r) for r in metadata.get(KEY, [])]
    if len(rehearsals) < 3:
        return None
    damages = [r.damage for r in rehearsals]
    best: Forecast | None = None
    smallest = math.inf
    for name in moved:
        if not all(name in r.disturbance for r in rehearsals):
            continue
        xs = [r.disturbance[name] for r in rehearsals]
        errors = sorted(
            abs(_slope(_without(xs, i), _without(damages, i)) * x - y)
            for i, (x, y) in enumerate(zip(xs, damages, strict=True))
        )
        mean = sum(errors) / len(errors)
        if mean < smallest:
            smallest = mean
            bar = errors[min(len(errors), math.ceil(COVERAGE * (len(errors) + 1))) - 1]
            share = _slope(xs, [r.changed for r in rehearsals]) * moved[name]
            chance = 100.0 * math.sqrt(share / min(r.examples for r in rehearsals))
            error = math.hypot(bar, NORMAL_QUANTILE * chance)
            best = Forecast(_slope(xs, damages) * moved[name], error, name, len(rehearsals))
    return best


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line through the origin with the least squares of errors, not below 0."""
    squares = sum(x * x for x in xs)
    return max(0.0, sum(x * y for x, y in zip(xs, ys, strict=True)) / squares) if squares else 0.0


def _without(values: Sequence[float], i: int) -> list[float]:
    return [*values[:i], *values[i + 1 :]]


def _remaining(logits: Tensor, removed: Sequence[int]) -> Tensor:
    """Log-probabilities over the classes that stay."""
    kept = [c for c in range(logits.shape[-1]) if c not in set(removed)]
    return logits[:, kept].double().log_softmax(dim=-1)


def _probes(inputs: Inputs, seed: int) -> dict[str, Tensor]:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 2:
        return {}
    generator = torch.Generator().manual_seed(seed_of(seed, 8))
    others = [d for d in range(inputs.ndim) if d != 1]
    mean, std = inputs.mean(dim=others, keepdim=True), inputs.std(dim=others, keepdim=True)
    noise = torch.randn((PROBES, *inputs.shape[1:]), generator=generator).to(inputs)
    a, b = (torch.randint(len(inputs), (PROBES,), generator=generator).to(inputs.device) for _ in range(2))
    return {"noise": mean + std * noise, "mixtures": (inputs[a] + inputs[b]) / 2}
