"""Seeds, eval mode and logits: what everything that runs a user's model needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError


def seed_of(*parts: int) -> int:
    """A 63-bit seed that differs for every tuple of small non-negative integers."""
    value = 0
    for part in parts:
        value = (value * 0x9E3779B97F4A7C15 + part + 1) % 2**63
    return value


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
