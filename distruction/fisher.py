"""Squared gradients of the log-likelihood: a parameter's importance to a data set (diagonal empirical Fisher)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .modules import deterministic, learnable


def per_sample(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of -log p(label | input), by parameter name, in eval mode.

    Memory for one batch of gradients, batch x parameters, is needed at a time.
    """
    params = learnable(model)
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    values = {n: p.detach() for n, p in params.items()}
    others = dict(model.named_buffers()) | {n: p.detach() for n, p in model.named_parameters() if n not in params}

    def negative_log_likelihood(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**values, **others}, (x[None],))
        return F.cross_entropy(logits, y[None])

    gradients = torch.func.vmap(torch.func.grad(negative_log_likelihood), in_dims=(None, 0, 0))
    device = next(model.parameters()).device
    count = 0
    # The fused attention kernels have no batching rule.
    with deterministic(model), sdpa_kernel(SDPBackend.MATH):
        for x, y in batches:
            count += len(y)
            for n, g in gradients(values, x.to(device), y.to(device)).items():
                total[n] += g.square().sum(dim=0)
    return {n: t / max(count, 1) for n, t in total.items()}


def batch_mean(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of the batch's *mean* loss, by parameter name, in eval mode.

    Not a Fisher diagonal: it shrinks with the batch size and depends on which examples share a batch. The public code
    of SSD computes it, and its alpha is tuned to it.
    """
    params = learnable(model)
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    device = next(model.parameters()).device
    count = 0
    with deterministic(model):
        for x, y in batches:
            count += 1
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            gradients = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
            for n, g in zip(params, gradients, strict=True):
                total[n] += g.square()
    return {n: t / max(count, 1) for n, t in total.items()}
