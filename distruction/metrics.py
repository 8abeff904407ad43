"""What is measured of a model: definitions as the field uses them."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) of a whole loader, on the CPU, in eval mode; the mode is restored."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        batches = [(model(x.to(device)).float().cpu(), y.cpu()) for x, y in loader]
    finally:
        model.train(was_training)
    if not batches:
        return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of examples whose largest logit is the label's, in percent; NaN for no examples."""
    return 100.0 * (logits.argmax(dim=-1) == labels).double().mean().item()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax in nats, (N,)."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


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
