"""What the library asks of a model: its mode and its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .errors import UsageError
from .seeds import private_generators


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, frozen BatchNorm statistics) and private global generators; both restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with private_generators():
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
