"""How an image becomes the input of a model, and data sets of image files that are made so: in memory or streamed."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .. import distributed
from ..errors import UsageError
from ..extras import needed
from .encoded import IN_MEMORY, Encoded
from .images import Images, loader
from .raw import pixels_of, upright

with needed("vision"):
    from PIL import Image, ImageOps


class Inputs(Protocol):
    """What makes a model's input of an image."""

    @property
    def channels(self) -> int:
        """1 or 3, of the image that it is given."""

    def facts(self) -> dict[str, Any]:
        """JSON-able: two that make the same inputs have the same facts."""

    def __call__(self, image: Image.Image, /) -> Tensor:
        """The input, (channels, height, width), float32."""


@dataclass(frozen=True)
class Pixels:
    """As `Images`: cropped to the central square, resized (bicubic) to ``side``, (bytes - mean) / std.

    Attributes:
        channels: 1 or 3.
        side: in pixels; images of that size stay as they are.
        mean, std: per channel, in units of the stored values.
    """

    channels: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Images) -> "Pixels":
        """Those of a data set in memory."""
        return cls(images.images.shape[1], images.images.shape[-1], images.mean, images.std)

    def facts(self) -> dict[str, Any]:
        """Everything that decides the input."""
        return {
            "kind": "pixels",
            "channels": self.channels,
            "side": self.side,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": "central square, bicubic",
        }

    def __call__(self, image: Image.Image) -> Tensor:
        """The normalised input."""
        array = np.array(ImageOps.fit(image, (self.side, self.side), Image.Resampling.BICUBIC))
        found = torch.from_numpy(array)
        found = found[None] if self.channels == 1 else found.permute(2, 0, 1)
        mean, std = (torch.tensor(t).view(-1, 1, 1) for t in (self.mean, self.std))
        return (found.float() - mean) / std


@dataclass(frozen=True)
class Called:
    """Inputs made by any function of an RGB or grey image.

    Attributes:
        function: image -> (channels, height, width).
        channels: 1 or 3.
        told: JSON-able facts about the function.
    """

    function: Callable[[Image.Image], Tensor]
    channels: int
    told: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """What was told about the function."""
        return dict(self.told)

    def __call__(self, image: Image.Image) -> Tensor:
        """What the function makes of it."""
        return self.function(image)


@dataclass(frozen=True)
class Labelled(Dataset[tuple[Tensor, Any]]):
    """What data sets of a model's classes have in common.

    Attributes:
        labels: int64, (N,), of the model's head.
        classes: the labels' names.
    """

    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Tensors(Labelled):
    """Inputs in memory, (N, channels, height, width); indexing with positions gives a batch."""

    inputs: Tensor

    def __getitem__(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


@dataclass(frozen=True)
class ImageFiles(Labelled):
    """Image files or rows of a table that are read each time; an index gives one example, for a loader with workers."""

    encoded: Encoded
    inputs: Inputs = field(repr=False)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = upright(self.encoded[index], "L" if self.inputs.channels == 1 else "RGB")
        return self.inputs(image), int(self.labels[index])


Data = Images | Tensors | ImageFiles


def read_images(
    encoded: Encoded, labels: Sequence[int], classes: Sequence[str], inputs: Inputs, *, skip_unreadable: bool
) -> tuple[Data, list[str]]:
    """Encoded images as a data set: in memory where they are small, else read in each epoch.

    Args:
        skip_unreadable: leave out images that cannot be read, instead of stopping at the first.

    Returns:
        The data; why images were left out.

    Raises:
        UsageError: an image cannot be read, or none is left.
    """
    files = ImageFiles(torch.tensor(labels, dtype=torch.int64), tuple(classes), encoded, inputs)
    reasons: dict[int, str] = {}
    if isinstance(inputs, Pixels):
        size = inputs.channels * inputs.side**2
    else:
        size = _first(files, reasons, skip_unreadable).nbytes
    small = size * len(files) <= IN_MEMORY

    def one(position: int) -> Tensor | None:
        try:
            if isinstance(inputs, Pixels) and small:
                array = pixels_of(encoded[position], inputs.channels, inputs.side)
                return torch.from_numpy(array.copy())
            return files[position][0]
        except UsageError as error:
            reasons[position] = _unreadable(error, skip_unreadable)
            return None

    if not small and not skip_unreadable:
        return files, []
    with ThreadPoolExecutor() as pool:
        read = list(
            pool.map(lambda i: one(i) if small else (None if one(i) is None else files.labels[i]), range(len(files)))
        )
    kept = [i for i in range(len(files)) if read[i] is not None]
    if not kept:
        raise UsageError(f"no readable image is left: {next(iter(reasons.values()), 'there was none')}")
    notes = [reasons[i] for i in sorted(reasons)]
    labels_kept = files.labels[kept]
    if not small:
        return replace(files, labels=labels_kept, encoded=encoded.take(kept)), notes
    stacked = torch.stack([t for t in read if t is not None])
    if isinstance(inputs, Pixels):
        return Images(stacked, labels_kept, files.classes, inputs.mean, inputs.std), notes
    return Tensors(labels_kept, files.classes, stacked), notes


def _first(files: ImageFiles, reasons: dict[int, str], skip_unreadable: bool) -> Tensor:
    """The first input that can be read, which tells the size of all."""
    for position in range(len(files)):
        try:
            return files[position][0]
        except UsageError as error:
            reasons[position] = _unreadable(error, skip_unreadable)
    raise UsageError(f"no readable image is left: {next(iter(reasons.values()), 'there was none')}")


def _unreadable(error: UsageError, skip: bool) -> str:
    if not skip:
        raise UsageError(
            f"{error}; mend or remove it, or leave such images out by --skip-unreadable (skip_unreadable=True)"
        ) from error
    return str(error)


def batches(data: Data, *, batch_size: int, shuffle: bool = False, workers: int = 0) -> DataLoader[Any]:
    """A loader of ``(inputs, labels)`` batches; files are read by ``workers`` processes, on each rank its part."""
    if not isinstance(data, ImageFiles):
        return loader(data, batch_size=batch_size, shuffle=shuffle)
    ranks = distributed.size()
    sampler: DistributedSampler[Any] | None = DistributedSampler(data) if shuffle and ranks > 1 else None
    return DataLoader(
        data,
        batch_size if sampler is None else max(1, batch_size // ranks),
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
