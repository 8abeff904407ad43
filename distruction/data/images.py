"""Image classification data in memory, normalised batch by batch."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from ..errors import UsageError


class Examples(Protocol):
    """Anything that gives a batch ``(inputs, labels)`` for a list of positions."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: Sequence[int], /) -> tuple[Tensor, Tensor]:
        """The batch of these positions."""


@dataclass(frozen=True)
class Images(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images; indexing with a list of positions gives a normalised batch.

    The pixels stay bytes in the CPU's memory; a batch of bytes goes to ``device`` and is normalised there.

    Attributes:
        images: uint8, (N, channels, height, width).
        labels: int64, (N,), those of the model's head.
        classes: the labels' names.
        mean, std: per channel, in units of the stored values; a batch is (images - mean) / std.
        fine: int64, (N,), finer labels of which each is a part of one of ``labels``; or ``None``.
        fine_classes: their names.
        device: where batches are.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fine: Tensor | None = None
    fine_classes: tuple[str, ...] = ()
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        mean, std = self._moments
        images, labels = (t[index].to(self.device) for t in (self.images, self.labels))
        return (images.float() - mean) / std, labels

    @functools.cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and std on the device: made once, because each copy to a GPU waits for it."""
        mean, std = (torch.tensor(t, device=self.device).view(-1, 1, 1) for t in (self.mean, self.std))
        return mean, std

    def to(self, device: torch.device | str) -> "Images":
        """The same data, with batches on ``device``."""
        return replace(self, device=device)

    def subset(self, where: Tensor) -> "Images":
        """The examples selected by a boolean mask or by positions."""
        fine = None if self.fine is None else self.fine[where]
        return replace(self, images=self.images[where], labels=self.labels[where], fine=fine)

    def members(self, name: str) -> Tensor:
        """Mask of the examples of a class: bool, (N,).

        Raises:
            UsageError: it is none of ``classes`` and none of ``fine_classes``.
        """
        if name in self.classes:
            return self.labels == self.classes.index(name)
        if self.fine is not None and name in self.fine_classes:
            return self.fine == self.fine_classes.index(name)
        raise UsageError(f"class {name!r} is unknown; the classes are {', '.join((*self.classes, *self.fine_classes))}")


def loader(data: Dataset[Any] | Examples, *, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    """Batches, the last one possibly smaller, of a data set that is indexed by lists of positions, such as `Images`.

    The order of ``shuffle`` is drawn from the global generator.
    """
    # PyTorch wants a Sized data set, which every one here is, and reads lists of positions only without types.
    order = RandomSampler(data) if shuffle else SequentialSampler(data)  # type: ignore[arg-type]
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)  # type: ignore[arg-type]


def grouped(data: Images, groups: Mapping[str, Sequence[str]]) -> Images:
    """The data labelled by super class; its own labels become the fine ones.

    Args:
        groups: super class to its classes.

    Raises:
        UsageError: the groups do not name each class of the data exactly once.
    """
    members = [name for fine in groups.values() for name in fine]
    if sorted(members) != sorted(data.classes):
        missing = sorted(set(data.classes) - set(members))
        extra = sorted({m for m in members if m not in data.classes or members.count(m) > 1})
        raise UsageError(
            f"the super classes must name each class once; missing: {missing}, unknown or repeated: {extra}"
        )
    table = torch.tensor([next(i for i, fine in enumerate(groups.values()) if c in fine) for c in data.classes])
    return replace(data, labels=table[data.labels], classes=tuple(groups), fine=data.labels, fine_classes=data.classes)


def forget_split(data: Images, forget_class: str | Sequence[str]) -> tuple[Images, Images]:
    """The examples of one class or several, fine classes included, and the others.

    Raises:
        UsageError: a class is not one of the data set's, is named twice, or has no examples.
    """
    names = [forget_class] if isinstance(forget_class, str) else list(forget_class)
    if not names or len(set(names)) < len(names):
        raise UsageError(f"name each class to forget once, not {', '.join(names) or 'none'}")
    mask = torch.zeros(len(data), dtype=torch.bool)
    for name in names:
        members = data.members(name)
        if not members.any():
            raise UsageError(f"class {name!r} has no examples, so there is nothing to forget")
        mask |= members
    return data.subset(mask), data.subset(~mask)


def hold_out(data: Images, share: float, seed: int = 0) -> tuple[Images, Images]:
    """What remains of a training set, and a validation part of it with ``share`` of each class, drawn by ``seed``.

    Settings that are chosen on the validation part leave the test set unseen. Fine classes are the strata where there
    are any.

    Raises:
        UsageError: ``share`` is not in (0, 1), or leaves a class without an example on either side.
    """
    if not 0 < share < 1:
        raise UsageError(f"the share to hold out must be in (0, 1), not {share}")
    strata = data.labels if data.fine is None else data.fine
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(data), dtype=torch.bool)
    for stratum in strata.unique():
        members = (strata == stratum).nonzero().squeeze(-1)
        count = round(share * len(members))
        if not 0 < count < len(members):
            raise UsageError(f"{share:g} of {len(members)} examples of a class cannot be held out; change the share")
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return data.subset(~mask), data.subset(mask)
