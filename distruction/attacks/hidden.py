"""Attacks on the penultimate features, in which a class may live on that no logit shows."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Examples
from ..errors import UsageError
from ..extras import needed
from ..features import features_of
from .attacker import DRAWS, check_counts, few

with needed("vision"):
    from sklearn.linear_model import LogisticRegression


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
    check_counts(shots=shots, draws=draws)
    (known, labels), (others, other_labels), (seen, truth) = (
        features_of(model, data, classifier=classifier) for data in (forget, retain, probe)
    )
    known, others = F.normalize(known, dim=-1), F.normalize(others, dim=-1)
    kept = sorted(set(other_labels.tolist()) - set(labels.tolist()))
    means = [others[other_labels == c].mean(dim=0) for c in kept]
    gone = sorted(set(labels.tolist()))
    shares = []
    for draw in range(draws):
        chosen = few(labels, shots, seed, draw)
        own = [known[chosen][labels[chosen] == c].mean(dim=0) for c in gone]
        found = nearest_prototype(torch.stack([*means, *own]), seen)
        shares.append((torch.tensor([*kept, *gone])[found] == truth).double().mean().item())
    return 100.0 * float(np.mean(shares))


def linear_probe(
    model: nn.Module,
    forget: Examples,
    retain: Examples,
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
        forget, retain: training examples of the forgotten and of the other classes.
        probe: unseen examples of the forgotten classes.

    Raises:
        UsageError: an argument is out of range, or a set is empty.
    """
    if not regularisation > 0:
        raise UsageError(f"regularisation must be > 0, not {regularisation}")
    (gone, labels), (kept, other_labels), (seen, truth) = (
        features_of(model, data, classifier=classifier) for data in (forget, retain, probe)
    )
    x, y, seen = torch.cat([gone, kept]).double(), torch.cat([labels, other_labels]), seen.double()
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-12)
    fitted = LogisticRegression(C=1 / (regularisation * len(x)), max_iter=2000)
    fitted.fit(((x - mean) / std).numpy(), y.numpy())
    return 100.0 * float((fitted.predict(((seen - mean) / std).numpy()) == truth.numpy()).mean())
