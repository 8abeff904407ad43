"""What a loader gives, seeded and the same ones however often a run resumed, and how the ranks share it."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..errors import UsageError
from ..seeds import seed_of

Batches = Iterable[tuple[Tensor, Tensor]]


def seeded_batches(loader: Batches, *, seed: int, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches ``start .. stop`` of an endless repetition of ``loader``, the same ones however often a run resumed.

    PyTorch's global generator is seeded at each epoch, which fixes a shuffling loader's order, and again before each
    batch is handed out, which fixes what the model draws (dropout, random labels). A distributed sampler is told the
    epoch.

    Raises:
        UsageError: the loader is empty.
    """
    step = 0
    epoch = 0
    while step < stop:
        torch.manual_seed(seed_of(seed, 0, epoch))
        for sampler in _samplers(loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        empty = True
        for batch in loader:
            empty = False
            if step >= stop:
                return
            if step >= start:
                torch.manual_seed(seed_of(seed, 1, step))
                yield batch
            step += 1
        if empty:
            raise UsageError("the data loader gave no batch; the data set is empty")
        epoch += 1


@dataclass(frozen=True)
class Batch:
    """One step's batch, spread over the ranks.

    Attributes:
        inputs: rows of this rank for the forward pass; a stand-in row where ``count`` is 0.
        count: how many of them are of the batch.
        start: where they stand in the whole batch.
        targets: (batch,) of the whole batch.
        whole_inputs: of the whole batch; this rank's where nobody needs them all.
    """

    inputs: Tensor
    count: int
    start: int
    targets: Tensor
    whole_inputs: Tensor

    def whole(self, logits: Tensor) -> Tensor:
        """The logits of the whole batch from each rank's."""
        return distributed.gather_rows(logits[: self.count], self.start, len(self.targets))


class Batching:
    """Makes a `Batch` of what the loader gives: a global batch on each rank, or each rank's own part of one.

    A loader with a distributed sampler (``torch.utils.data.DistributedSampler``, timm's, accelerate's) gives each rank
    a part, and the parts together are the batch; any other gives every rank the whole batch, which is then split.
    """

    def __init__(self, loader: Batches, device: torch.device, *, needs_inputs: bool) -> None:
        self._in_parts = any(
            getattr(s, name, 1) > 1 for s in _samplers(loader) for name in ("num_replicas", "num_processes")
        )
        self._device = device
        self._needs_inputs = needs_inputs
        self._checked = distributed.size() == 1

    def __call__(self, batch: Any) -> Batch:
        """The batch, on the model's device.

        Raises:
            UsageError: not labelled, or the ranks' loaders give different batches without a distributed sampler.
        """
        inputs, targets = _labelled(batch, self._device)
        rank, size = distributed.rank(), distributed.size()
        if size > 1 and self._in_parts:
            return self._from_parts(inputs, targets)
        if not self._checked:
            digest = hashlib.sha256(targets.cpu().numpy().tobytes()).digest()
            if not distributed.agree(int.from_bytes(digest[:7], "big"), self._device):
                raise UsageError(
                    "the ranks' loaders give different batches: give every rank the same loader, whose batches are "
                    "then split between the ranks, or one with torch.utils.data.DistributedSampler"
                )
            self._checked = True
        start, stop = (i * len(targets) // size for i in (rank, rank + 1))
        own = inputs[start:stop] if stop > start else inputs[:1]
        return Batch(own, stop - start, start, targets, inputs)

    def _from_parts(self, inputs: Tensor, targets: Tensor) -> Batch:
        counts = torch.zeros(distributed.size(), dtype=torch.int64, device=self._device)
        counts[distributed.rank()] = len(targets)
        distributed.all_reduce_([counts])
        start, total = int(counts[: distributed.rank()].sum()), int(counts.sum())
        whole_inputs = distributed.gather_rows(inputs, start, total) if self._needs_inputs else inputs
        return Batch(inputs, len(targets), start, distributed.gather_rows(targets, start, total), whole_inputs)


def _samplers(loader: Any) -> Iterator[Any]:
    """The loader's samplers and those inside of them."""
    for name in ("sampler", "batch_sampler"):
        if (inner := getattr(loader, name, None)) is not None:
            yield inner
            yield from _samplers(inner)


def _labelled(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise UsageError("the loader must give (inputs, targets) pairs of tensors")
    inputs, targets = batch
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
