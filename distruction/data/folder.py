"""ImageFolder trees: ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (or ``val/``), as torchvision reads them."""

from pathlib import Path

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from ..errors import UsageError
from .raw import Raw, Source, decode

_TEST = ("test", "val", "valid", "validation")


def holds(place: Path) -> bool:
    """Whether ``place/train`` has folders in it."""
    return _has_folders(place / "train")


def read(place: Path, side: int | None) -> Raw:
    """The two parts, by class and then by path; classes are the folders of ``train``, in alphabetical order.

    Raises:
        UsageError: a part or a class has no images, the test part has a class of its own, or an image cannot be read.
    """
    test = next((place / name for name in _TEST if _has_folders(place / name)), None)
    if test is None:
        raise UsageError(f"{place} has train/, but none of {', '.join(f'{n}/' for n in _TEST)} with class folders")
    names, numbers = find_classes(str(place / "train"))
    extra = sorted(set(find_classes(str(test))[0]) - set(names))
    if extra:
        raise UsageError(f"{test} has classes that {place / 'train'} lacks: {', '.join(extra)}")
    try:
        train_files = make_dataset(str(place / "train"), numbers, IMG_EXTENSIONS)
        test_files = make_dataset(str(test), numbers, IMG_EXTENSIONS, allow_empty=True)
    except FileNotFoundError as error:
        raise UsageError(f"{place / 'train'}: {error}") from error
    files = train_files + test_files
    sources: list[Source] = [(path, Path(path).read_bytes) for path, _ in files]
    images = decode(sources, side)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    count = len(train_files)
    return Raw((images[:count], labels[:count]), (images[count:], labels[count:]), tuple(names))


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())
