"""Attacks on an unlearned model: what of the forgotten a person with the model and some data can bring back.

Definitions and traps are in docs/metrics.md; shares and accuracies are in percent. Every attack is determined by its
seed and leaves the model as it was. Compare its number with the one of a retrained model, never with 0.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import metrics
from .data import Examples, loader
from .errors import UsageError
from .extras import needed
from .features import features_of
from .modules import check_same, deterministic, logits_of, parameters_of
from .seeds import seed_of

with needed("vision"):
    from sklearn.linear_model import LogisticRegression

DRAWS = 5
"""Draws of the attacker's few examples whose results are averaged."""


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside to the model's parameters, gradients and buffers, outside they are as they were."""
    held = {t: t.detach().clone() for t in (*model.parameters(), *model.buffers())}
    gradients = {p: p.grad for p in model.parameters()}
    for p in gradients:
        p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for t, values in held.items():
                t.copy_(values)
        for p, gradient in gradients.items():
            p.grad = gradient


# --- features ------------------------------------------------------------------------------------


def nearest_prototype(prototypes: Tensor, features: Tensor) -> Tensor:
    """Index of the prototype with the largest cosine to each feature, (N,).

    Args:
        prototypes: (classes, dimensions).
        features: (N, dimensions).
    """
    return (F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).T).argmax(dim=-1)


def prototype(
    model: nn.Module,
    forget: Examples,
    retain: Examples,
    probe: Examples,
    *,
    shots: int,
    draws: int = DRAWS,
    seed: int = 0,
    classifier: str | None = None,
) -> float:
    """Share of ``probe`` that the nearest class mean of penultimate features calls by its label.

    A class's prototype is the mean of its examples' features, each of length one: of ``shots`` examples of each
    forgotten class, and of all that ``retain`` has of each other (Snell, Swersky, Zemel 2017, arXiv 1703.05175, with
    cosines). The mean over ``draws`` of the examples.

    Args:
        forget: what the attacker draws the examples of forgotten classes from, without replacement.
        retain: examples of the other classes.
        probe: unseen examples of the forgotten classes.
        shots: examples of each forgotten class; all where it has fewer.

    Raises:
        UsageError: an argument is out of range, or a set is empty.
    """
    _check(shots=shots, draws=draws)
    (known, labels), (others, other_labels), (seen, truth) = (
        features_of(model, data, classifier=classifier) for data in (forget, retain, probe)
    )
    known, others = F.normalize(known, dim=-1), F.normalize(others, dim=-1)
    kept = sorted(set(other_labels.tolist()) - set(labels.tolist()))
    means = [others[other_labels == c].mean(dim=0) for c in kept]
    gone = sorted(set(labels.tolist()))
    shares = []
    for draw in range(draws):
        few = _few(labels, shots, seed, draw)
        own = [known[few][labels[few] == c].mean(dim=0) for c in gone]
        found = nearest_prototype(torch.stack([*means, *own]), seen)
        shares.append((torch.tensor([*kept, *gone])[found] == truth).double().mean().item())
    return 100.0 * float(np.mean(shares))


def linear_probe(
    model: nn.Module,
    train: Examples,
    probe: Examples,
    *,
    regularisation: float = 1e-3,
    classifier: str | None = None,
) -> float:
    """Share of ``probe`` that a new linear classifier on the penultimate features calls by its label.

    Multinomial logistic regression on standardised features, minimising the mean cross entropy +
    ``regularisation``/2 |W|**2 (Alain, Bengio 2016, arXiv 1610.01644): it says what is linearly there, which is much in
    a model that never saw the class as well.

    Args:
        train: examples of all classes.

    Raises:
        UsageError: an argument is out of range, or a set is empty.
    """
    if not regularisation > 0:
        raise UsageError(f"regularisation must be > 0, not {regularisation}")
    (x, y), (seen, truth) = (features_of(model, data, classifier=classifier) for data in (train, probe))
    x, seen = x.double(), seen.double()
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-12)
    fitted = LogisticRegression(C=1 / (regularisation * len(x)), max_iter=2000)
    fitted.fit(((x - mean) / std).numpy(), y.numpy())
    return 100.0 * float((fitted.predict(((seen - mean) / std).numpy()) == truth.numpy()).mean())


# --- training again ------------------------------------------------------------------------------


def few_shot(
    model: nn.Module,
    forget: Examples,
    probe: Examples,
    *,
    shots: int = 5,
    steps: int = 20,
    lr: float = 1e-4,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """Accuracy on ``probe`` after ``steps`` of Adam on the same ``shots`` examples of each forgotten class.

    In eval mode (no dropout, frozen BatchNorm statistics); the mean over ``draws`` of the examples.

    Args:
        forget: what the examples are drawn from, without replacement.
        probe: unseen examples of the forgotten classes.

    Raises:
        UsageError: an argument is out of range, or a set is empty.
    """
    _check(shots=shots, steps=steps, draws=draws)
    if len(forget) == 0 or len(probe) == 0:
        raise UsageError("the forget set and the probe must hold examples to attack with")
    labels = forget[list(range(len(forget)))][1].cpu()
    found = []
    for draw in range(draws):
        batch = forget[_few(labels, shots, seed, draw).tolist()]
        with unchanged(model):
            _fine_tune(model, [batch] * steps, lr)
            found.append(metrics.accuracy(*metrics.predict(model, loader(probe, batch_size=512))))
    return float(np.mean(found))


def relearn(
    model: nn.Module,
    retain: Examples,
    probe: Examples,
    *,
    steps: int = 100,
    lr: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> float:
    """Accuracy on ``probe``, of the forgotten, after ``steps`` of Adam on ``retain`` alone: what comes back by itself.

    Raises:
        UsageError: an argument is out of range, or a set is empty.
    """
    _check(steps=steps, batch_size=batch_size)
    if len(retain) == 0 or len(probe) == 0:
        raise UsageError("the retained data and the probe must hold examples to attack with")
    generator = torch.Generator().manual_seed(seed_of(seed, 8))
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += torch.randperm(len(retain), generator=generator).tolist()
    with unchanged(model):
        _fine_tune(model, (retain[order[i * batch_size : (i + 1) * batch_size]] for i in range(steps)), lr)
        return metrics.accuracy(*metrics.predict(model, loader(probe, batch_size=512)))


def _fine_tune(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], lr: float) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    with deterministic(model):
        for x, y in batches:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits_of(model(x.to(device))), y.to(device)).backward()
            optimizer.step()


# --- membership ----------------------------------------------------------------------------------


def loss_membership(model: nn.Module, forget: Examples, held_out: Examples) -> float:
    """Area under the ROC curve of telling ``forget`` from ``held_out`` by the loss: see `metrics.attack_auc`."""
    ours, others = (-metrics.loss(*metrics.predict(model, loader(d, batch_size=512))) for d in (forget, held_out))
    return metrics.attack_auc(ours, others)


def lira(model: nn.Module, forget: Examples, held_out: Examples, out_models: Sequence[nn.Module]) -> float:
    """Area under the ROC curve of the offline likelihood-ratio attack: see `metrics.lira`.

    Args:
        out_models: trained on neither set, such as models retrained without ``forget``.

    Raises:
        UsageError: there is no such model.
    """
    if not out_models:
        raise UsageError("LiRA needs a model that was not trained on the forget set: retrain one")

    def scores(data: Examples) -> Tensor:
        batches = loader(data, batch_size=512)
        odds = [metrics.log_odds(*metrics.predict(m, batches)) for m in (model, *out_models)]
        return metrics.lira(odds[0], torch.stack(odds[1:]))

    return metrics.attack_auc(scores(forget), scores(held_out))


# --- weights -------------------------------------------------------------------------------------

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


# --- the attacker's examples ---------------------------------------------------------------------


def _few(labels: Tensor, shots: int, seed: int, draw: int) -> Tensor:
    """Positions of ``shots`` examples of each label, or of all where it has fewer, ascending."""
    generator = torch.Generator().manual_seed(seed_of(seed, 9, draw))
    keys = torch.rand(len(labels), generator=generator)
    chosen = []
    for c in sorted(set(labels.tolist())):
        where = (labels == c).nonzero().squeeze(-1)
        chosen.append(where[keys[where].argsort()[:shots]])
    return torch.cat(chosen).sort().values


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"{name} must be an integer >= 1, not {count!r}")


COLUMNS = {
    "retain": "D_r",
    "forget": "D_f",
    "prototype_5": "prototype, 5",
    "prototype_50": "prototype, 50",
    "few_shot_20": "few shots, 20 steps",
    "few_shot_100": "few shots, 100 steps",
    "relearn_100": "relearning, 100 steps",
    "linear_probe": "linear probe",
    "auc_loss": "loss AUC",
    "auc_lira": "LiRA AUC",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
    "distance": "L2 distance",
    "barrier": "barrier, nats",
}
"""What `battery` finds, and what it is called in tables."""


def battery(
    model: nn.Module,
    train: tuple[Examples, Examples],
    test: tuple[Examples, Examples],
    whole: Examples,
    *,
    original: nn.Module | None = None,
    out_models: Sequence[nn.Module] = (),
    draws: int = DRAWS,
    seed: int = 0,
    classifier: str | None = None,
) -> dict[str, float]:
    """All attacks with their usual settings, by the names of `COLUMNS`.

    Args:
        train, test: the forgotten and the retained part of each.
        whole: both parts of ``train``, for the linear probe.
        original: the model before it forgot, for the distance and the barrier on the retained training examples.
        out_models: models that never saw the forget set, for LiRA.
        draws: of the few examples.
    """
    (forget, retain), (probe, others) = train, test
    found = {
        "retain": metrics.accuracy(*metrics.predict(model, loader(others, batch_size=512))),
        "forget": metrics.accuracy(*metrics.predict(model, loader(probe, batch_size=512))),
    }
    for shots in (5, 50):
        found[f"prototype_{shots}"] = prototype(
            model, forget, retain, probe, shots=shots, draws=draws, seed=seed, classifier=classifier
        )
    for steps in (20, 100):
        found[f"few_shot_{steps}"] = few_shot(model, forget, probe, steps=steps, draws=draws, seed=seed)
    found["relearn_100"] = relearn(model, retain, probe, seed=seed)
    found["linear_probe"] = linear_probe(model, whole, probe, classifier=classifier)
    found["auc_loss"] = loss_membership(model, forget, probe)
    if out_models:
        found["auc_lira"] = lira(model, forget, probe, out_models)
    for how in ROUNDINGS:
        found[how] = rounding(model, probe, how)
    if original is not None:
        found["distance"] = distance(model, original)
        found["barrier"] = barrier(model, original, retain)
    return found
