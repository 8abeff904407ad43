"""Selective Synaptic Dampening: shrink the weights that matter more to the forget set than to the whole.

Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", AAAI 2024,
arXiv 2308.07707.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import fisher
from ..data import loader
from ..errors import UsageError
from ..modules import learnable
from .base import Method, Mixed, Selected, Task


@torch.no_grad()
def dampen_(
    model: nn.Module, whole: Mapping[str, Tensor], forget: Mapping[str, Tensor], *, alpha: float, strength: float
) -> None:
    """theta <- min(strength * I_D / I_f, 1) * theta where I_f > alpha * I_D (paper, equations 5 and 6).

    Args:
        whole, forget: importances I_D and I_f by parameter name.
        alpha: selection threshold, > 0.
        strength: the paper's lambda, > 0.
    """
    for name, p in learnable(model).items():
        factor = (strength * whole[name] / forget[name]).clamp(max=1)
        p.copy_(torch.where(forget[name] > alpha * whole[name], factor * p, p))


def ssd(task: Task, *, alpha: float = 10.0, strength: float = 1.0, batch_size: int = 64) -> None:
    """SSD as published: importances are squared gradients of batch means, over batches sorted by class."""
    _check(alpha, strength)
    data = _everything(task)
    by_class = Selected(data, data.labels.argsort(stable=True))
    whole = fisher.batch_mean(task.model, loader(by_class, batch_size=batch_size))
    forget = fisher.batch_mean(task.model, loader(task.forget, batch_size=batch_size))
    dampen_(task.model, whole, forget, alpha=alpha, strength=strength)


def ssd_per_sample(task: Task, *, alpha: float = 10.0, strength: float = 1.0, batch_size: int = 16) -> None:
    """SSD with the diagonal Fisher that its paper defines: squared gradients of single examples."""
    _check(alpha, strength)
    whole = fisher.per_sample(task.model, loader(_everything(task), batch_size=batch_size))
    forget = fisher.per_sample(task.model, loader(task.forget, batch_size=batch_size))
    dampen_(task.model, whole, forget, alpha=alpha, strength=strength)


def _check(alpha: float, strength: float) -> None:
    if not (alpha > 0 and strength > 0):
        raise UsageError(f"alpha and strength must be > 0, not {alpha} and {strength}")


def _everything(task: Task) -> Mixed:
    return Mixed((task.forget, task.forget.labels), (task.retain, task.retain.labels))


PAPER = "Foster, Schoepf, Brintrup 2024, https://arxiv.org/abs/2308.07707"
BATCH_MEAN = Method("dampen weights important to the forget set, as published", PAPER, ssd, reads="all", sweep="alpha")
PER_SAMPLE = Method("SSD with per-sample squared gradients", PAPER, ssd_per_sample, reads="all", sweep="alpha")
