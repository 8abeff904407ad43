"""Data sets by name, found below a folder."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..errors import UsageError
from . import idx
from .images import Images

FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A published data set.

    Attributes:
        classes: names in the order of its labels.
        places: folders to look in, relative to the root.
        system: the folder of its Debian package.
        get: how to get it.
    """

    classes: tuple[str, ...]
    places: tuple[str, ...]
    system: str
    get: str

    def tried(self, root: Path | None) -> Iterator[Path]:
        """Where it may be, the likeliest first."""
        if root is None:
            yield Path(self.system)
        else:
            yield from (root / place for place in (*self.places, self.system.lstrip("/")))


KNOWN = {
    "fashion-mnist": Known(
        FASHION_MNIST,
        (".", "fashion-mnist", "FashionMNIST/raw"),
        "/usr/share/datasets/fashion-mnist",
        "install Debian's package dataset-fashion-mnist (or unpack it: apt-get download, dpkg-deb -x FILE ROOT)",
    )
}
NAMES = ("digits", *KNOWN)


def load(name: str, root: str | Path | None = None) -> tuple[Images, Images]:
    """The train and test parts of a data set by name.

    ``digits``: scikit-learn's 1,797 scans of handwritten digits, 8x8, values 0..16 (Alpaydin, Kaynak 1998), split
    80 : 20, stratified, by a fixed seed; needs no root.
    ``fashion-mnist``: 60,000 and 10,000 images, 28x28 (Xiao, Rasul, Vollgraf 2017), from IDX files.

    Args:
        root: folder in which the data set is looked for; ``None`` is where its Debian package puts it.

    Raises:
        UsageError: the name is unknown, or the data set is missing or damaged.
    """
    if name == "digits":
        return _digits()
    if name not in KNOWN:
        raise UsageError(f"data set {name!r} is unknown; choose {', '.join(NAMES)}")
    known = KNOWN[name]
    root = None if root is None else Path(root)
    tried = list(known.tried(root))
    for folder in tried:
        if idx.holds(folder):
            return _parts(*idx.read(folder), known.classes, folder)
    raise UsageError(f"no {name} in {', '.join(map(str, tried))}; {known.get}, and pass its folder by --data")


def _parts(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: tuple[str, ...], where: Path
) -> tuple[Images, Images]:
    for part, (images, labels) in (("training", train), ("test", test)):
        if not len(images):
            raise UsageError(f"the {part} part in {where} has no images")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise UsageError(
                f"the {part} labels in {where} run from {labels.min()} to {labels.max()}, "
                f"but there are {len(classes)} classes"
            )
    mean, std = moments(train[0])
    made = [Images(images, labels, classes, mean, std) for images, labels in (train, test)]
    return made[0], made[1]


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (N, channels, height, width), from exact sums."""
    channels = images.shape[1]
    total, squares = torch.zeros(channels, dtype=torch.int64), torch.zeros(channels, dtype=torch.int64)
    for chunk in images.split(4096):
        values = chunk.int()
        total += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count = images.numel() // channels
    sums = list(zip(total.tolist(), squares.tolist(), strict=True))
    mean = tuple(t / count for t, _ in sums)
    return mean, tuple(math.sqrt((s * count - t * t) / (count * (count - 1))) for t, s in sums)


def _digits() -> tuple[Images, Images]:
    bunch = load_digits()
    images, labels = torch.from_numpy(bunch.images).to(torch.uint8)[:, None], torch.from_numpy(bunch.target).long()
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    mean, std = moments(images[train])
    whole = Images(images, labels, tuple(str(c) for c in bunch.target_names), mean, std)
    return whole.subset(train), whole.subset(test)
