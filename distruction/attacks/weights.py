"""What rounding a model's weights brings back, and how far they are from the original's."""

import torch
from torch import Tensor, nn

from .. import metrics
from ..data import Examples, loader
from ..errors import UsageError
from ..modules import check_same, parameters_of
from .attacker import unchanged

ROUNDINGS = {"bf16": 16, "int8": 8, "int4": 4}
"""Ways to round weights, and their bits."""


def rounded(weight: Tensor, how: str) -> Tensor:
    """The values of ``weight`` rounded to bfloat16, or to integers times a step for each row.

    int8 and int4: w' = s round(w / s), s = max |w| of the row (of an output channel) / (2**(bits - 1) - 1). The
    values of a vector, such as a bias, stay.

    Raises:
        UsageError: ``how`` is none of `ROUNDINGS`.
    """
    if how not in ROUNDINGS:
        raise UsageError(f"rounding {how!r} is unknown; choose {', '.join(ROUNDINGS)}")
    if how == "bf16":
        return weight.bfloat16().to(weight.dtype)
    if weight.ndim < 2:
        return weight
    rows = weight.flatten(1)
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (ROUNDINGS[how] - 1) - 1)
    return torch.where(step > 0, (rows / step).round() * step, rows).view_as(weight)


def rounding(model: nn.Module, probe: Examples, how: str) -> float:
    """Accuracy on ``probe`` of the model with every parameter `rounded`: small changes may round away."""
    with unchanged(model):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(rounded(p, how))
        return metrics.accuracy(*metrics.predict(model, loader(probe, batch_size=512)))


def distance(model: nn.Module, original: nn.Module) -> float:
    """Euclidean distance of the two models' parameters.

    Raises:
        PosteriorError: they are different models.
    """
    ours, theirs = _alike(model, original)
    return float(sum((a - theirs[n].to(a)).detach().double().square().sum().item() for n, a in ours.items()) ** 0.5)


def barrier(model: nn.Module, original: nn.Module, data: Examples, *, points: int = 11) -> float:
    """How far the mean loss rises over the straight line between the losses of two models, on the way between them.

    max over t of L((1 - t) a + t b) - ((1 - t) L(a) + t L(b)), t = 0, ..., 1 (Frankle, Dziugaite, Roy, Carbin 2020,
    arXiv 1912.05671), in nats. 0: they are linearly connected.

    Args:
        points: values of t, >= 3.

    Raises:
        UsageError: too few points, or no data.
        PosteriorError: they are different models.
    """
    if points < 3:
        raise UsageError(f"points must be >= 3, not {points}")
    if len(data) == 0:
        raise UsageError("there are no examples to take losses of")
    ours, theirs = _alike(model, original)
    here = {n: p.detach().clone() for n, p in ours.items()}
    ts: list[float] = torch.linspace(0, 1, points).tolist()
    losses: list[float] = []
    with unchanged(model):
        for t in ts:
            with torch.no_grad():
                for n, p in ours.items():
                    p.copy_(here[n].lerp(theirs[n].detach().to(p), t))
            losses.append(metrics.loss(*metrics.predict(model, loader(data, batch_size=512))).mean().item())
    return max(found - (1 - t) * losses[0] - t * losses[-1] for t, found in zip(ts, losses, strict=True))


def _alike(model: nn.Module, original: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    ours, theirs = parameters_of(model), parameters_of(original)
    check_same({n: p.shape for n, p in ours.items()}, {n: p.shape for n, p in theirs.items()}, "the original model")
    return ours, theirs
