"""Attacks that tell from a model's answers what it was trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import metrics
from ..data import Examples, loader
from ..errors import UsageError
from ..extras import needed
from .attacker import check_counts

with needed("vision"):
    from sklearn.linear_model import LogisticRegression


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


def class_membership(
    model: nn.Module,
    forget: Examples,
    retain: Examples,
    probe: Examples,
    others: Examples,
    *,
    neighbours: int = 3,
    regularisation: float = 1e-3,
) -> float:
    """Area under the ROC curve of telling a forgotten class from its neighbours by what is said of the other classes.

    The neighbours are the remaining classes with the largest mean probability over ``forget``, the forgotten ones left
    out of the softmax. The attacker fits a logistic regression (mean loss, both sides weighed equally, plus
    ``regularisation``/2 |w|**2) to standardised log-probabilities of the remaining classes, of ``forget`` against the
    neighbours in ``retain``, and is measured on ``probe`` against those in ``others``. It is the kind of attack of
    Ebrahimpour-Boroojeny, Wang, Sundaram 2025, arXiv 2506.20893.

    Args:
        forget, retain: training examples of the forgotten and of the other classes.
        probe, others: unseen ones.
        neighbours: how many.

    Raises:
        UsageError: an argument is out of range, a set is empty, or fewer than two classes remain.
    """
    check_counts(neighbours=neighbours)
    if not regularisation > 0:
        raise UsageError(f"regularisation must be > 0, not {regularisation}")
    for name, data in {"forget": forget, "retain": retain, "probe": probe, "others": others}.items():
        if len(data) == 0:
            raise UsageError(f"{name} holds no examples to attack with")
    answers, labels = zip(
        *(metrics.predict(model, loader(d, batch_size=512)) for d in (forget, retain, probe, others)), strict=True
    )
    remain = sorted(set(labels[1].tolist()) - set(labels[0].tolist()))
    if len(remain) < 2:
        raise UsageError(f"the retained examples are of {len(remain)} classes: there is nothing to tell by")
    gone, kept, unseen, other = (a[:, remain].double().log_softmax(dim=-1) for a in answers)
    nearest = torch.tensor(remain)[gone.exp().mean(dim=0).argsort(descending=True)[:neighbours]]
    kept, other = (a[torch.isin(y, nearest)] for a, y in ((kept, labels[1]), (other, labels[3])))
    if len(other) == 0:
        raise UsageError(f"others holds no example of the nearest classes, {nearest.tolist()}")
    x = torch.cat([gone, kept])
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-12)
    fitted = LogisticRegression(C=1 / (regularisation * len(x)), class_weight="balanced", max_iter=2000)
    fitted.fit(((x - mean) / std).numpy(), (torch.arange(len(x)) < len(gone)).numpy())
    ours, theirs = (torch.from_numpy(fitted.decision_function(((a - mean) / std).numpy())) for a in (unseen, other))
    return metrics.attack_auc(ours, theirs)
