"""Data sets by name, found below a folder in whatever form they are there."""

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataWarning, UsageError
from ..extras import needed
from . import cifar, folder, idx, names, parquet
from .images import Images, grouped
from .raw import Format, Part, Raw

with needed("vision"):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

ANY: tuple[Format, ...] = (folder, parquet)
"""The forms in which any data set may come."""


@dataclass(frozen=True)
class Known:
    """A published data set.

    Attributes:
        classes: names in the order of its labels.
        native: the form in which it was published.
        places: where to look, relative to the root.
        get: how to get it.
        system: the folder of its Debian package.
    """

    classes: tuple[str, ...]
    native: Format
    places: tuple[str, ...]
    get: str
    system: str | None = None

    def tried(self, root: Path | None) -> Iterator[Path]:
        """Where it may be, the most likely first."""
        if root is not None:
            yield from (root / place for place in self.places)
        if self.system is not None:
            yield Path(self.system) if root is None else root / self.system.lstrip("/")


_CIFAR = (
    "get {archive} from its authors' page (Krizhevsky, University of Toronto) or by "
    "torchvision.datasets.{name}(ROOT, download=True); Parquet files and ImageFolder trees do as well"
)
KNOWN = {
    "fashion-mnist": Known(
        names.FASHION_MNIST,
        idx,
        ("fashion-mnist", "FashionMNIST/raw", "."),
        "install Debian's package dataset-fashion-mnist (or unpack it: apt-get download, dpkg-deb -x FILE ROOT)",
        "/usr/share/datasets/fashion-mnist",
    ),
    "cifar10": Known(
        names.CIFAR10,
        cifar.CIFAR10,
        ("cifar10", "."),
        _CIFAR.format(archive=cifar.CIFAR10.archive, name="CIFAR10"),
    ),
    "cifar100": Known(
        names.CIFAR100,
        cifar.CIFAR100,
        ("cifar100", "."),
        _CIFAR.format(archive=cifar.CIFAR100.archive, name="CIFAR100"),
    ),
}
NAMES = ("digits", "fashion-mnist", "cifar10", "cifar20", "cifar100")


def load(
    name: str,
    root: str | Path | None = None,
    *,
    side: int | None = None,
    need_test: bool = True,
    skip_unreadable: bool = False,
) -> tuple[Images, Images]:
    """The train and test parts of a data set.

    | name            | data                                                                                        |
    |-----------------|---------------------------------------------------------------------------------------------|
    | `digits`        | scikit-learn's 1,797 handwritten digits, 8x8, values 0..16 (Alpaydin, Kaynak 1998), split   |
    |                 | 80 : 20, stratified, by a fixed seed; needs no root                                         |
    | `fashion-mnist` | 60,000 and 10,000 images, 28x28 (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747)              |
    | `cifar10`       | 50,000 and 10,000 images, 32x32, of 10 classes (Krizhevsky 2009)                            |
    | `cifar100`      | as many of 100 classes                                                                      |
    | `cifar20`       | the images of CIFAR-100 with its 20 coarse labels; the 100 are the fine ones                |
    | any other       | a folder, relative to the root (`.` is the root): an ImageFolder tree or Parquet files      |

    The published sets are found as published (IDX files; Python archives, also as .tar.gz), as torchvision leaves them,
    as Parquet files of the Hugging Face hub and as ImageFolder trees with the classes' names or numbers.

    Args:
        root: folder in which the data set is looked for, or its archive; ``None`` is where its Debian package puts it.
        side: pixels to which images of differing sizes are cropped and resized; those of one size stay as they are.
        need_test: refuse data without labelled test images. If false, the test part is empty then.
        skip_unreadable: leave out image files that cannot be read, instead of stopping at the first one.

    Warns:
        DataWarning: files were not read, images were left out, or the test part is empty.

    Raises:
        UsageError: the data set is missing, damaged, or not what the name says.
    """
    if name == "digits":
        return _digits()
    root = None if root is None else Path(root)
    if name == "cifar20":
        train, test = load("cifar100", root, side=side, need_test=need_test, skip_unreadable=skip_unreadable)
        return grouped(train, names.CIFAR20), grouped(test, names.CIFAR20)
    known = KNOWN.get(name)
    places = list(known.tried(root)) if known else [Path(name) if root is None else root / name]
    forms = (known.native, *ANY) if known else ANY
    found = _found(places, forms)
    if found is None:
        raise UsageError(_missing(name, root, places))
    place, form = found
    raw = form.read(place, side, skip_unreadable)
    for note in raw.notes:
        warnings.warn(note, DataWarning, stacklevel=2)
    return _images(raw if known is None else _numbered(raw, known.classes, name, place), place, need_test)


def detect(root: str | Path | None) -> str:
    """The name of the one data set in ``root``; ``digits`` without a root, CIFAR-100 with its fine labels.

    Raises:
        UsageError: there is none, or several.
    """
    if root is None:
        return "digits"
    root = Path(root)
    found = [name for name, known in KNOWN.items() if _found(known.tried(root), (known.native,))]
    if not found and _found([root], ANY):
        return "."
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{root} holds several data sets; choose one of {', '.join(found)} by --dataset")
    raise UsageError(
        f"no data set in {root}: {_content(root)}; it may hold CIFAR's Python archives, IDX files of Fashion-MNIST, "
        "train/ and test/ with a folder per class, or Parquet files (name it by --dataset if it is in a sub-folder)"
    )


def is_kept_whole(name: str, root: Path | None) -> bool:
    """Whether `load` finds the data set as archives, Parquet files or class folders with its published classes."""
    known = KNOWN.get(name)
    if name == "cifar20":
        return is_kept_whole("cifar100", root)
    if known is not None:
        return root is None or _found(known.tried(root), (known.native, *ANY)) is not None
    return name == "digits" or parquet.holds(Path(name) if root is None else root / name)


def _found(places: Iterator[Path] | list[Path], forms: tuple[Format, ...]) -> tuple[Path, Format] | None:
    return next(((place, form) for place in places for form in forms if form.holds(place)), None)


def _missing(name: str, root: Path | None, places: list[Path]) -> str:
    tried = ", ".join(map(str, places)) or "no folder"
    known = KNOWN.get(name)
    if known is None:
        return (
            f"data set {name!r} is none of {', '.join(NAMES)}, and {tried} is no folder with train/ and test/ or with "
            f"Parquet files: {_content(places[0])}"
        )
    content = f" ({_content(root)})" if root is not None else ""
    return f"no {name} found; tried {tried}{content}. {known.get[0].upper()}{known.get[1:]}; pass its folder by --data"


def _content(path: Path) -> str:
    """What is there, for messages."""
    if not path.is_dir():
        return f"{path} is a file of another kind" if path.exists() else f"{path} does not exist"
    entries = sorted(entry.name for entry in path.iterdir())
    more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
    return f"{path} holds {', '.join(entries[:8]) or 'nothing'}{more}"


def _numbered(raw: Raw, classes: tuple[str, ...], name: str, where: Path) -> Raw:
    """The data with the official numbers of its classes.

    Raises:
        UsageError: it has classes of other names.
    """
    if raw.names is None or raw.names == classes:
        return replace(raw, names=classes)
    if all(n.isdecimal() for n in raw.names):
        table = [int(n) for n in raw.names]
    else:
        # The hub's CIFAR-100 calls the crab "cra"; folders cannot be called "T-shirt/top".
        official = {_plain(c): i for i, c in enumerate(classes)} | (
            {"cra": classes.index("crab")} if "crab" in classes else {}
        )
        other = [n for n in raw.names if _plain(n) not in official]
        if other:
            raise UsageError(f"{where} is not {name}: it has classes named {', '.join(other[:5])}")
        table = [official[_plain(n)] for n in raw.names]
    numbers = torch.tensor(table)

    def renumbered(part: Part) -> Part:
        if _unlabelled(part[1]):
            return part
        _check(part[1], len(numbers), where)
        return part[0], numbers[part[1]]

    return replace(
        raw, train=renumbered(raw.train), test=None if raw.test is None else renumbered(raw.test), names=classes
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _check(labels: Tensor, classes: int, where: Path) -> None:
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise UsageError(
            f"the labels in {where} run from {labels.min()} to {labels.max()}, but there are {classes} classes"
        )


def _images(raw: Raw, where: Path, need_test: bool) -> tuple[Images, Images]:
    assert raw.names is not None
    images, labels = raw.train
    if not len(images):
        raise UsageError(f"the training part in {where} has no images")
    if _unlabelled(labels):
        raise UsageError(f"the training part in {where} has no labels: all of them are -1")
    _check(labels, len(raw.names), where)
    mean, std = moments(images)
    train = Images(images, labels, raw.names, mean, std)
    test = _test_part(raw, where)
    if isinstance(test, str):
        if need_test:
            raise UsageError(f"{test}; labelled test images are needed here")
        warnings.warn(f"no test images: {test}", DataWarning, stacklevel=3)
        return train, train.subset(torch.empty(0, dtype=torch.int64))
    _check(test[1], len(raw.names), where)
    if images.shape[1:] != test[0].shape[1:]:
        shapes = " and ".join(str(tuple(t.shape[1:])) for t in (images, test[0]))
        raise UsageError(f"the images of the two parts in {where} differ in shape: {shapes}")
    return train, Images(*test, raw.names, mean, std)


def _unlabelled(labels: Tensor) -> bool:
    """Whether they only hold the place of labels that are kept secret."""
    return len(labels) > 0 and bool((labels == -1).all())


def _test_part(raw: Raw, where: Path) -> Part | str:
    """The labelled test images, or why there are none."""
    if raw.test is None:
        return raw.no_test
    if not len(raw.test[0]):
        return f"the test part in {where} has no images"
    return f"the labels of the test part in {where} are all -1" if _unlabelled(raw.test[1]) else raw.test


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (N, channels, height, width), from exact sums.

    The standard deviation of a constant channel is 1: it becomes 0 everywhere, and no NaN.
    """
    channels = images.shape[1]
    total, squares = torch.zeros(channels, dtype=torch.int64), torch.zeros(channels, dtype=torch.int64)
    for chunk in images.split(4096):
        values = chunk.int()
        total += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count = images.numel() // channels
    sums = list(zip(total.tolist(), squares.tolist(), strict=True))
    mean = tuple(t / count for t, _ in sums)
    return mean, tuple(
        math.sqrt((s * count - t * t) / (count * (count - 1))) if s * count > t * t else 1.0 for t, s in sums
    )


def _digits() -> tuple[Images, Images]:
    bunch = load_digits()
    images, labels = torch.from_numpy(bunch.images).to(torch.uint8)[:, None], torch.from_numpy(bunch.target).long()
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    mean, std = moments(images[train])
    whole = Images(images, labels, tuple(str(c) for c in bunch.target_names), mean, std)
    return whole.subset(train), whole.subset(test)
