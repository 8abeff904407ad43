"""Image classification data in memory, normalised batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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
class Images(Dataset):
    """Labelled images; indexing with a list of positions gives a normalised batch.

    Attributes:
        images: uint8, (N, channels, height, width).
        labels: int64, (N,).
        classes: the classes' names.
        mean, std: per channel, in units of the stored values; a batch is (images - mean) / std.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (self.mean, self.std))
        return (self.images[index].float() - mean) / std, self.labels[index]

    def subset(self, where: Tensor) -> "Images":
        """The examples selected by a boolean mask or by positions."""
        return replace(self, images=self.images[where], labels=self.labels[where])


def loader(data: Examples, *, batch_size: int, shuffle: bool = False) -> DataLoader:
    """A loader of normalised ``(images, labels)`` batches, the last one possibly smaller."""
    order = RandomSampler(data) if shuffle else SequentialSampler(data)
    batches = BatchSampler(order, batch_size, drop_last=False)
    return DataLoader(data, sampler=batches, batch_size=None)  # type: ignore[arg-type]


def forget_split(data: Images, forget_class: str | int) -> tuple[Images, Images]:
    """The examples of one class, and the others.

    Raises:
        UsageError: the class is not one of the data set's, or has no examples.
    """
    names = data.classes
    if isinstance(forget_class, str):
        if forget_class not in names:
            raise UsageError(f"class {forget_class!r} is unknown; the classes are {', '.join(names)}")
        forget_class = names.index(forget_class)
    if not 0 <= forget_class < len(names):
        raise UsageError(f"class {forget_class} is out of range; there are {len(names)}: 0 to {len(names) - 1}")
    mask = data.labels == forget_class
    if not mask.any():
        raise UsageError(f"class {names[forget_class]!r} has no examples, so there is nothing to forget")
    return data.subset(mask), data.subset(~mask)
