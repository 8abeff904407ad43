"""What a loader gives: the same batches however often a run resumed, spread over the ranks.

A batch is one of

- a pair ``(inputs, targets)``, where inputs are a tensor or a mapping of tensors;
- a mapping that holds the targets under one of `TARGETS`, and inputs under every other key, as Hugging Face's data sets
  give them.

A mapping of several inputs goes to ``model(**inputs)``, one of a single tensor to ``model(tensor)``. What a causal
language model is given, `distruction.loop.tokens` says.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..errors import UsageError
from ..modules import unwrapped
from ..seeds import seed_all, seed_of
from . import tokens
from .loaders import Role, epoch_length, generators, restarted, samplers, why_empty

Inputs = Tensor | Mapping[str, Tensor]
Batches = Iterable[Any]
TARGETS = ("labels", "label", "targets", "target")
"""Names that a mapping's targets may have."""


_LABELS = "labels"


def seeded_batches(loader: Batches, *, seed: int, start: int, stop: int, role: Role) -> Iterator[Any]:
    """Batches ``start .. stop`` of an endless repetition of ``loader``, the same ones however often a run resumed.

    The global generators (PyTorch's, NumPy's, Python's) and the loader's own are seeded at each epoch, which fixes a
    shuffling loader's order; the global ones before each further batch is fetched, which fixes what the data set
    draws, and before each batch is handed out, which fixes what the model draws (random labels). A distributed sampler
    is told the epoch. What an earlier run has seen is fetched again, but for whole epochs of loaders that are known to
    keep nothing between epochs. At the end the loader's own generators are as they were.

    Raises:
        UsageError: an epoch gave no batch.
    """
    loader = restarted(loader)
    own = generators(loader)
    length = epoch_length(loader)
    epoch = start // length if length else 0
    step = epoch * (length or 0)
    states = [generator.get_state() for generator in own]
    try:
        while step < stop:
            before = step
            seed_all(seed_of(seed, 0, epoch), own)
            for sampler in samplers(loader):
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(epoch)
            batches = iter(loader)
            while step < stop:
                if step > before:
                    seed_all(seed_of(seed, 2, step))
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                if step >= start:
                    seed_all(seed_of(seed, 1, step))
                    yield batch
                step += 1
            if step == before:
                raise UsageError(why_empty(loader, role, before))
            epoch += 1
    finally:
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


def apply(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """``function`` of each tensor of the inputs."""
    return function(inputs) if isinstance(inputs, Tensor) else {name: function(t) for name, t in inputs.items()}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for the inputs of a batch."""
    return model(inputs) if isinstance(inputs, Tensor) else model(**keywords(model, inputs))


def keywords(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``model`` is called with by name: a language model keeps no cache for a pass that generates nothing."""
    generates: Any = getattr(unwrapped(model), "can_generate", None)
    return (
        {**inputs, "use_cache": False} if "input_ids" in inputs and callable(generates) and generates() else {**inputs}
    )


@dataclass(frozen=True)
class Batch:
    """One step's batch, spread over the ranks.

    Attributes:
        inputs: rows of this rank for the forward pass; a stand-in row where ``count`` is 0.
        count: how many of them are of the batch.
        start: where they stand in the whole batch.
        targets: of the whole batch.
        whole_inputs: of the whole batch; this rank's where nobody needs them all.
        sequences: of a language model's batch: then everything is of this rank alone, and the targets are its tokens.
    """

    inputs: Inputs
    count: int
    start: int
    targets: Tensor
    whole_inputs: Inputs
    sequences: tokens.Sequences | None = None

    def whole(self, logits: Tensor) -> Tensor:
        """The logits of the whole batch from each rank's; of a language model's, those of this rank's tokens."""
        if self.sequences is not None:
            return self.sequences.answers(logits)
        return distributed.gather_rows(logits[: self.count], self.start, len(self.targets))


class Batching:
    """Makes a `Batch` of what the loader gives: a global batch on each rank, or each rank's own part of one.

    A loader with a distributed sampler (``torch.utils.data.DistributedSampler``, timm's, accelerate's) gives each rank
    a part, and the parts together are the batch; any other gives every rank the whole batch, which is then split.
    """

    def __init__(self, loader: Batches, device: torch.device, *, needs_inputs: bool, role: Role) -> None:
        self._in_parts = any(
            getattr(s, name, 1) > 1 for s in samplers(loader) for name in ("num_replicas", "num_processes")
        )
        self._device = device
        self._needs_inputs = needs_inputs
        self._role = role
        self._checked = distributed.size() == 1

    def __call__(self, batch: Any) -> Batch:
        """The batch, on the model's device.

        Raises:
            UsageError: not labelled, or the ranks' loaders give different batches without a distributed sampler.
        """
        inputs, targets = unpack(batch, self._role)
        inputs = apply(self._here, inputs)
        targets = self._here(targets)
        rank, size = distributed.rank(), distributed.size()
        text = not isinstance(inputs, Tensor) and tokens.is_text(inputs, targets)
        if size > 1 and self._in_parts:
            if text:
                assert not isinstance(inputs, Tensor)
                return _of_text(tokens.spread(inputs, targets, None, self._role.name))
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
        if text:
            assert not isinstance(inputs, Tensor)
            return _of_text(tokens.spread(inputs, targets, slice(start, stop), self._role.name))
        own = apply(lambda t: t[start:stop] if stop > start else t[:1], inputs)
        return Batch(own, stop - start, start, targets, inputs)

    def texts(self, batch: Any) -> tuple[Mapping[str, Tensor], Tensor]:
        """Inputs and labels of a language model's whole batch, on every rank."""
        inputs, labels = unpack(batch, self._role)
        assert not isinstance(inputs, Tensor)
        tensors = {name: self._here(t) for name, t in {**inputs, _LABELS: labels}.items()}
        if distributed.size() > 1 and self._in_parts:
            sizes = torch.zeros(2, distributed.size(), dtype=torch.int64, device=self._device)
            sizes[:, distributed.rank()] = torch.tensor(labels.shape)
            distributed.all_reduce_([sizes])
            start, total = int(sizes[0, : distributed.rank()].sum()), int(sizes[0].sum())
            for name, t in tensors.items():
                if t.ndim == 2:
                    t = tokens.lengthened(t, int(sizes[1].max()), tokens.IGNORED if name == _LABELS else 0)
                tensors[name] = distributed.gather_rows(t, start, total)
        labels = tensors.pop(_LABELS)
        return tensors, labels

    def _here(self, t: Tensor) -> Tensor:
        here = t.to(self._device, non_blocking=True)
        # Features that were computed in inference mode may go into a pass with gradients as a copy.
        return here.clone() if here.is_inference() else here

    def _from_parts(self, inputs: Inputs, targets: Tensor) -> Batch:
        counts = torch.zeros(distributed.size(), dtype=torch.int64, device=self._device)
        counts[distributed.rank()] = len(targets)
        distributed.all_reduce_([counts])
        start, total = int(counts[: distributed.rank()].sum()), int(counts.sum())

        def gathered(t: Tensor) -> Tensor:
            return distributed.gather_rows(t, start, total)

        whole_inputs = apply(gathered, inputs) if self._needs_inputs else inputs
        return Batch(inputs, len(targets), start, gathered(targets), whole_inputs)


def _of_text(here: tokens.Sequences) -> Batch:
    return Batch(here, len(here.labels), 0, here.tokens, here, here)


def unpack(batch: Any, role: Role) -> tuple[Inputs, Tensor]:
    """The inputs and targets of a batch, of which the module's head says what it may be.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(batch, Mapping):
        names = [name for name in TARGETS if name in batch]
        if len(names) != 1:
            raise UsageError(
                f"a batch of {role.name} is a mapping of {', '.join(map(repr, batch))}, with {len(names)} of the names "
                f"{', '.join(TARGETS)} that say what the targets are: rename them in the loader's collate_fn"
            )
        pair: tuple[Any, Any] = ({k: v for k, v in batch.items() if k != names[0]}, batch[names[0]])
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        pair = (batch[0], batch[1])
    else:
        what = f"a {type(batch).__name__}" + (f" of {len(batch)} entries" if isinstance(batch, tuple | list) else "")
        raise UsageError(
            f"a batch of {role.name} is {what}; the loader must give (inputs, targets) pairs of tensors, or a mapping "
            "such as {'pixel_values': ..., 'labels': ...}, whose entries but the labels go to the model: say by "
            "collate_fn which entries these are"
        )
    inputs, targets = pair
    tensors = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
    entries = {**tensors, "targets": targets}
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{name} in a batch of {role.name} is a {type(value).__name__}; the loader must give (inputs, targets) "
                "pairs of tensors or a mapping of tensors: convert it or leave it out in the loader's collate_fn"
            )
    for name, value in entries.items():
        if value.ndim == 0 or targets.ndim == 0 or len(value) != len(targets):
            raise UsageError(
                f"a batch of {role.name} has {len(value) if value.ndim else 'a scalar as'} {name} and "
                f"{len(targets) if targets.ndim else 'a scalar as'} targets; give as many of both"
            )
    if not tensors:
        raise UsageError(f"a batch of {role.name} has targets and no inputs; give the model's inputs beside them")
    if len(targets) == 0:
        raise UsageError(f"a batch of {role.name} holds no example; leave empty batches out of the loader")
    if tokens.is_text(tensors, targets) and isinstance(inputs, Mapping):
        return tensors, targets
    return (next(iter(tensors.values())) if len(tensors) == 1 else tensors), targets
