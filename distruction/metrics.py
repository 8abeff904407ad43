"""What is measured of a model: definitions as the field uses them, with their formulas and traps in docs/metrics.md.

Logits are (N, classes), of any float type; what is derived from them is computed in float64, as a confident model's
probabilities are 1 in float32 and its losses all tie at 0. Shares, accuracies and areas are in percent.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Examples, Images, loader
from .errors import UsageError
from .extras import needed
from .modules import deterministic, logits_of
from .registry import Registry
from .targets import log_odds as log_odds

with needed("vision"):
    from scipy.stats import binomtest
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score, roc_curve


# --- metrics of other packages -------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a metric of another package is given of one finished cell of `distruction bench`.

    Attributes:
        model, before, retrained: after unlearning, as it was trained, and retrained without the forget set.
        forget, retain, test: training examples to forget and to keep, and all test examples.
    """

    model: nn.Module
    before: nn.Module
    retrained: nn.Module
    forget: Images
    retain: Images
    test: Images


@dataclass(frozen=True)
class Entry:
    """A metric of another package.

    Attributes:
        function: of a `Measured` to a number.
        heading: short, for table heads.
        meaning: one line.
        better: ``high``, ``low``, or ``retrain`` where the value of retraining is the ideal.
        group: the table that it stands in: ``accuracy``, ``distance`` or ``cost``.
        digits: after the decimal point.
    """

    function: Callable[[Measured], float]
    heading: str
    meaning: str
    better: Literal["high", "low", "retrain"]
    group: Literal["accuracy", "distance", "cost"] = "accuracy"
    digits: int = 1


REGISTRY = Registry[Entry]("metric", {})
"""Metrics of other packages by name, which `distruction bench` measures and tabulates beside its own."""


def register(
    name: str, heading: str, meaning: str, *, better: Literal["high", "low", "retrain"], **declared: Any
) -> Callable[[Callable[[Measured], float]], Callable[[Measured], float]]:
    """A decorator that adds a function of `Measured` as a metric under ``name``: see `distruction.registry`.

    Args:
        heading, meaning, better, declared: the attributes of `Entry`.

    Raises:
        UsageError: the name is taken.
    """

    def add(function: Callable[[Measured], float]) -> Callable[[Measured], float]:
        REGISTRY.add(name, Entry(function, heading, meaning, better, **declared))
        return function

    return add


# --- predictions ---------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) of a whole loader, on the CPU, in eval mode.

    Each module's mode and the global generator are restored, so that a measurement changes nothing that follows it.
    """
    device = next(model.parameters()).device
    with deterministic(model):
        batches = [(logits_of(model(x.to(device))).float().cpu(), y.cpu()) for x, y in loader]
    if not batches:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


# --- accuracy ------------------------------------------------------------------------------------


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of examples whose largest logit is the label's, in percent; NaN for no examples."""
    return 100.0 * (logits.argmax(dim=-1) == labels).double().mean().item()


def batch_mean_accuracy(logits: Tensor, labels: Tensor, batch_size: int) -> float:
    """Unweighted mean of the accuracies of consecutive batches, in percent, as the published tables have it.

    A last batch of 36 examples counts as much as one of 64; equal to `accuracy` where ``batch_size`` divides N.
    """
    batches = zip(logits.split(batch_size), labels.split(batch_size), strict=True)
    return float(np.mean([accuracy(*batch) for batch in batches]))


def wilson_interval(percent: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of ``count`` independent examples, in percent (Wilson 1927)."""
    interval = binomtest(round(percent * count / 100), count).proportion_ci(confidence, method="wilson")
    return 100.0 * float(interval.low), 100.0 * float(interval.high)


# --- membership inference ------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax in nats, (N,)."""
    log_p = F.log_softmax(logits.double(), dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each example in nats, float64, (N,)."""
    return F.cross_entropy(logits.double(), labels, reduction="none")


def entropy_mia(members: Tensor, non_members: Tensor, forget: Tensor) -> float:
    """Membership inference by prediction entropy, as the published tables have it.

    A class-balanced logistic regression on the softmax's entropy separates retain-train examples (members) from
    test examples; the score is the percentage of forget-train examples that it calls members (Foster, Schoepf,
    Brintrup 2023). Zero is not the ideal: the ideal is what retraining scores.

    Args:
        members, non_members, forget: logits, (N_i, classes) each.
    """
    features = torch.cat([entropy(members), entropy(non_members)]).numpy()[:, None]
    labels = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
    attack = LogisticRegression(class_weight="balanced", solver="lbfgs").fit(features, labels)
    return 100.0 * float(attack.predict(entropy(forget).numpy()[:, None]).mean())


def loss_mia(members: Tensor, non_members: Tensor, forget: Tensor) -> float:
    """Membership inference by a threshold on the loss: an example is called a member where its loss is <= tau.

    tau has the largest advantage TPR - FPR on members against non-members (Yeom, Giacomelli, Fredrikson, Jha 2018,
    arXiv 1709.01604, definition 4 and section 3.3; of several the smallest). The score is the percentage of
    ``forget`` called members; the ideal is what retraining scores.

    Args:
        members, non_members, forget: losses, (N_i,) each.
    """
    fpr, tpr, thresholds = _roc(-members, -non_members)
    return 100.0 * float((-forget.numpy() >= thresholds[np.argmax(tpr - fpr)]).mean())


def lira(confidences: Tensor, out_confidences: Tensor) -> Tensor:
    """Likelihood-ratio attack: how much more confident a model is of examples than models not trained on them are.

    LiRA of Carlini et al. 2022 (arXiv 2112.03570) in its offline form, one variance for all examples, as they advise
    for few shadow models: 1 - Pr[N(mu_out, sigma**2) > confidence] orders examples as confidence - mu_out does.

    Args:
        confidences: `log_odds` of the attacked model, (N,).
        out_confidences: of K shadow models that were not trained on the example, (K, N); the same K for members and
            non-members, or the attack tells apart how well the mean is known.

    Returns:
        Scores, (N,), higher for members.
    """
    return confidences - out_confidences.mean(dim=0)


def attack_auc(members: Tensor, non_members: Tensor) -> float:
    """Area under an attack's ROC curve in percent: the chance that a member scores above a non-member, ties half.

    50 is an attack that learns nothing.

    Args:
        members, non_members: scores, (N_i,) each, higher for members.
    """
    truth = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
    return 100.0 * float(roc_auc_score(truth, torch.cat([members, non_members]).numpy()))


def attack_tpr(members: Tensor, non_members: Tensor, fpr: float = 0.01) -> float:
    """Percentage of members found at a false-positive rate of at most ``fpr`` (Carlini et al. 2022, arXiv 2112.03570).

    With fewer than 1 / fpr non-members this is the share of members above every one of them.

    Args:
        members, non_members: scores, (N_i,) each, higher for members.
    """
    false, true, _ = _roc(members, non_members)
    return 100.0 * float(true[false <= fpr].max())


def _roc(members: Tensor, non_members: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False-positive rates, true-positive rates and thresholds, most cautious attack first."""
    truth = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
    scores = torch.cat([members, non_members]).numpy()
    curve: tuple[np.ndarray, np.ndarray, np.ndarray] = roc_curve(truth, scores, drop_intermediate=False)
    return curve


# --- distance to another model -------------------------------------------------------------------


def jensen_shannon(logits: Tensor, others: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two models' softmaxes by example, in bits (0 to 1), (N,).

    JS(p, q) = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (Lin 1991). Evaluated from log-probabilities, so that
    a probability of 0 adds 0 and not NaN.
    """
    p, q = F.log_softmax(logits.double(), dim=-1), F.log_softmax(others.double(), dim=-1)
    m = torch.logaddexp(p, q) - math.log(2)
    nats = 0.5 * (p.exp() * (p - m) + q.exp() * (q - m)).sum(dim=-1)
    return nats.clamp(min=0) / math.log(2)


def logit_distance(logits: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance of two models' logits by example, each less its mean over the classes, (N,).

    A constant added to all logits of an example changes no prediction, so it must not count.
    """
    difference = logits.double() - others.double()
    distance: Tensor = (difference - difference.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return distance


def zero_retrain_forgetting(logits: Tensor, incompetent: Tensor) -> float:
    """ZRF = 1 - mean JS(model, incompetent teacher) on the forget set, from 0 to 1.

    Zero retrain forgetting of Chundawat, Tarun, Mandal, Kankanhalli 2023 (arXiv 2205.08096). 1 is a model that answers
    like one that was never trained; the ideal is what retraining scores.

    Args:
        logits: of the unlearned model on the forget set.
        incompetent: of a randomly initialised model that no method learnt from.
    """
    return 1.0 - jensen_shannon(logits, incompetent).mean().item()


# --- relearning ----------------------------------------------------------------------------------


def relearn_steps(
    model: nn.Module,
    forget: Examples,
    target: float,
    *,
    lr: float = 1e-4,
    batch_size: int = 64,
    max_steps: int = 100,
    probe: Examples | None = None,
) -> int:
    """Steps of fine-tuning on the forget set until ``model`` classifies it with ``target`` accuracy again.

    The relearn time of the anamnesis index (Chundawat, Tarun, Mandal, Kankanhalli 2023, arXiv 2201.05629), which is
    this number divided by retraining's. Adam in eval mode (no dropout, frozen BatchNorm statistics) on batches of
    consecutive examples, over and over; nothing is drawn at random.

    Args:
        model: is trained; pass a copy.
        target: accuracy in percent.
        max_steps: also returned where the accuracy is not back by then.
        probe: what the accuracy is taken on after each step; the forget set by default.

    Raises:
        UsageError: the forget set is empty.
    """
    if len(forget) == 0:
        raise UsageError("the forget set is empty, so there is nothing to relearn")
    device = next(model.parameters()).device
    batches = loader(forget, batch_size=batch_size)
    probes = loader(forget if probe is None else probe, batch_size=512)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    step = 0
    with deterministic(model):
        while True:
            for x, y in batches:
                if accuracy(*predict(model, probes)) >= target or step == max_steps:
                    return step
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(logits_of(model(x.to(device))), y.to(device)).backward()
                optimizer.step()
                step += 1
