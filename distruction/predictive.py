"""Predictions averaged over samples of a posterior, with the model left as it was."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UsageError
from .modules import deterministic, logits_of
from .sharding import local, reshard

Inputs = Tensor | Mapping[str, Any] | Iterable[Any]


@dataclass(frozen=True)
class Prediction:
    """What samples of a posterior predict.

    Attributes:
        logits: (samples, inputs, classes), float32, on the model's device.
    """

    logits: Tensor

    @property
    def probabilities(self) -> Tensor:
        """Mean over the samples of the softmax over the last dimension, (inputs, classes).

        Raises:
            UsageError: the model has one output, whose softmax is 1 whatever it says.
        """
        if self.logits.ndim < 3 or self.logits.shape[-1] < 2:
            raise UsageError(
                f"the logits of each sample have shape {tuple(self.logits.shape[1:])}, and a softmax needs two classes "
                "or more; for one output take prediction.logits.sigmoid().mean(0)"
            )
        return self.logits.softmax(dim=-1).mean(dim=0)


@torch.no_grad()
def predict(
    model: nn.Module,
    params: Iterable[Tensor],
    sample: Callable[[int], None],
    inputs: Inputs,
    *,
    samples: int,
    seed: int,
    batch_size: int | None,
) -> Prediction:
    """The prediction; see `distruction.posterior.Posterior.predict`.

    Args:
        params: what ``sample`` writes.
        sample: writes the sample of a number into the model.
    """
    for name, value in (("samples", samples), ("batch_size", 1 if batch_size is None else batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} must be an integer >= 1, not {value!r}")
    params = list(params)
    device = params[0].device
    found: list[Tensor] = []
    with restored(model, params), deterministic(model):
        torch.manual_seed(seed)  # of a private generator, for what the model itself draws
        # Samples inside of batches, so that an iterable is read once; a sample is written in much less time than a
        # batch is computed in.
        for batch in _batches(inputs, batch_size):
            rows = _on(batch, device)
            logits = []
            for number in range(samples):
                reshard(model)  # or the sample goes into whole parameters that the forward pass before left
                sample(number)
                torch.clear_autocast_cache()  # it holds the weights of the sample before
                output = model(**rows) if isinstance(rows, Mapping) else model(rows)
                logits.append(logits_of(output).float().clone())
            found.append(torch.stack(logits))
    if not found:
        raise UsageError("the inputs have no batch, so there is nothing to predict")
    return Prediction(torch.cat(found, dim=1))


@contextmanager
def restored(model: nn.Module, params: list[Tensor]) -> Iterator[None]:
    """Whatever happens inside, ``params`` and the model's buffers are then what they were, to the bit."""
    kept = [(local(p), local(p).clone()) for p in params]
    buffers = [(m, n, b, None if b is None else b.clone()) for m in model.modules() for n, b in m._buffers.items()]
    try:
        yield
    finally:
        for p, before in kept:
            p.copy_(before)
        for module, name, buffer, value in buffers:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            if buffer is not None and value is not None:
                buffer.copy_(value)
        reshard(model)
        torch.clear_autocast_cache()


def _batches(inputs: Inputs, batch_size: int | None) -> Iterator[Any]:
    if isinstance(inputs, Tensor):
        yield from [inputs] if batch_size is None else inputs.split(batch_size)
    elif batch_size is not None:
        raise UsageError("batch_size splits one tensor; inputs that come in batches have theirs, so leave it out")
    elif isinstance(inputs, Mapping):
        yield inputs
    else:
        # Loaders of labelled data give (inputs, targets).
        yield from (batch[0] if isinstance(batch, tuple | list) else batch for batch in inputs)


def _on(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in batch.items()}
    if not isinstance(batch, Tensor):
        raise UsageError(
            f"predict takes a tensor, a dictionary of tensors, or batches of these, not {type(batch).__name__}"
        )
    return batch.to(device)
