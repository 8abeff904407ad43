"""DiStruction with stds that were not learnt: what the learnt ones are worth. All else is as in `distruction.found`."""

import torch
from torch import nn

from ..data import Images, loader
from ..fisher import per_sample
from ..initial import initial_std
from ..posterior import Posterior
from ..preparation import total_evidence
from .base import Method
from .distruction import found


def constant_std(posterior: Posterior) -> Posterior:
    """The posterior with one std everywhere, of the same mean precision 1/std**2."""
    precision = sum(s.double().pow(-2).sum().item() for s in posterior.stds.values()) / posterior.numel()
    std = precision**-0.5
    return Posterior(posterior.means, {n: torch.full_like(s, std) for n, s in posterior.stds.items()})


def fisher_std(model: nn.Module, data: Images, posterior: Posterior) -> Posterior:
    """The posterior with 1/std**2 = 1/std_init**2 + evidence * diagonal empirical Fisher of ``data``.

    The Fisher is the mean of squared per-example gradients of the log-likelihood (Laplace's usual diagonal), at the
    posterior's means, which ``model`` holds afterwards.
    """
    posterior.mean_(model)
    fisher = per_sample(model, loader(data, batch_size=64))
    initial = initial_std(model)
    evidence = total_evidence(posterior.metadata)
    return Posterior(
        posterior.means,
        {n: (initial[n] ** -2 + evidence * f).rsqrt() for n, f in fisher.items()},
        posterior.metadata,
    )


CONSTANT = Method(
    "distruction-auto with one std everywhere, of the same mean precision",
    "this library",
    found,
    reads="none",
    needs_posterior=True,
    preparation="constant",
    ablation=True,
    sweep="level",
)
FISHER = Method(
    "distruction-auto with the stds of a diagonal empirical Fisher",
    "this library",
    found,
    reads="none",
    needs_posterior=True,
    preparation="fisher",
    ablation=True,
    sweep="level",
)
