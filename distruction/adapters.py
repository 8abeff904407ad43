"""What a batch is, and what a model's outputs on it are worth, for data that comes in a form of its own.

Pairs (inputs, targets) and mappings such as ``{"pixel_values": ..., "labels": ...}`` are understood as they are, with
one label per example or one per pixel; several labels and values by a `distruction.likelihood`. For anything else an
adapter says it in two methods:

    class Captions:
        def unpack(self, batch):  # what the loader gives -> inputs of the model, targets
            return {"pixel_values": batch.image, "input_mask": batch.mask}, batch.score

        def losses(self, outputs, targets):  # one negative log-likelihood per example, in nats
            return torch.nn.functional.poisson_nll_loss(outputs, targets, reduction="none")

    posterior = prepare(model, loader, adapter=Captions())
    forget(model, posterior, to_forget, adapter=Captions(), objective=...)

Two more are used where it has them: ``sample_targets`` of `distruction.likelihood.Likelihood`, by which preparation
measures how precisely each weight must be known also where the model fits its data, and ``accuracy(outputs, targets)``,
in [0, 1] per example, which progress and the posterior's metadata show.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor

from .errors import UsageError
from .loop.batches import Batches, Inputs
from .loop.loaders import restarted


class Adapter(Protocol):
    """See the module."""

    def unpack(self, batch: Any, /) -> tuple[Inputs, Tensor]:
        """Inputs (a tensor, or a mapping of the model's arguments by name) and targets, the examples first."""

    def losses(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """(batch,) negative log-likelihoods, in nats."""


def adapted(loader: Batches, adapter: Adapter | None) -> Batches:
    """The loader, whose batches are what the adapter makes of them; all else of it is as it was.

    Raises:
        UsageError: the adapter lacks a method.
    """
    if adapter is None:
        return loader
    for name in ("unpack", "losses"):
        if not callable(getattr(adapter, name, None)):
            raise UsageError(
                f"the adapter {type(adapter).__name__} has no method {name}: it needs unpack(batch) -> (inputs, "
                "targets) and losses(outputs, targets) -> one per example"
            )
    if isinstance(adapter, type):
        raise UsageError(f"the adapter is the class {adapter.__name__}: pass one made of it, {adapter.__name__}(...)")
    if isinstance(loader, list | tuple):
        return [adapter.unpack(batch) for batch in loader]
    if not isinstance(loader, Iterable) or (isinstance(loader, Iterator) and not hasattr(loader, "reset")):
        return loader  # which is refused as it is
    return _Adapted(loader, adapter)


class _Adapted:
    """A loader with other batches."""

    persistent_workers = False
    """Each reading starts the loader's workers anew."""

    def __init__(self, loader: Any, adapter: Adapter) -> None:
        self._loader, self._adapter = loader, adapter

    def __iter__(self) -> Iterator[Any]:
        return map(self._adapter.unpack, restarted(self._loader))

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)
