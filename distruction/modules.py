"""What the library asks of a model: its parameters by name, their values' fingerprint, its mode, its logits."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from .errors import PosteriorError, UsageError
from .sharding import gather


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel`` and ``torch.compile``, whose parameters have their own names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, OptimizedModule):
            model = model._orig_mod
        else:
            return model


def learnable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that a posterior covers, by name: each with ``requires_grad``, tied ones once."""
    return {name: p for name, p in unwrapped(model).named_parameters() if p.requires_grad}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values in the order of the mapping."""
    digest = hashlib.sha256()
    for name, t in tensors.items():
        digest.update(f"{name}:{tuple(t.shape)};".encode())
        digest.update(gather(t.detach()).float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    only_a, only_b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    return f"only in the first {only_a[:3]}, only in the second {only_b[:3]}"


def check_same(shapes: Mapping[str, torch.Size], other: Mapping[str, torch.Size], what: str) -> None:
    if set(shapes) != set(other):
        raise PosteriorError(f"{what} belongs to another model: {difference(shapes, other)}")
    for name, shape in shapes.items():
        if shape != other[name]:
            raise PosteriorError(
                f"{what} belongs to another model: {name} is {tuple(shape)} here, {tuple(other[name])} there"
            )


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, frozen BatchNorm statistics) and a private global generator; both restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier gives: itself, or its ``logits``, as Hugging Face's models name them.

    Raises:
        UsageError: neither is a tensor.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"the model gives a {type(output).__name__}, neither logits nor an output with .logits; put it into a "
            "module whose forward returns its logits"
        )
    return logits
