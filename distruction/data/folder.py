"""ImageFolder trees: ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (or ``val/``), as torchvision reads them.

Every file whose ending Pillow knows is read; hidden files and folders are not, and what is not read is counted.
"""

import os
from pathlib import Path

import torch

from ..errors import UsageError
from .raw import Raw, Source, decode, extensions, file_source, ignored, named

TEST = ("test", "val", "valid", "validation")


def holds(place: Path) -> bool:
    """Whether ``place/train`` has folders in it."""
    return bool(class_folders(place / "train"))


def read(place: Path, side: int | None, skip_unreadable: bool) -> Raw:
    """The two parts, by class and then by path; classes are the folders of ``train``, in alphabetical order.

    Raises:
        UsageError: a class has no images, the test part has a class of its own, or an image cannot be read.
    """
    train = place / "train"
    names = class_folders(train)
    test = next((place / name for name in TEST if class_folders(place / name)), None)
    extra = sorted(set(class_folders(test)) - set(names)) if test is not None else []
    if extra:
        raise UsageError(f"{test} has classes that {train} lacks: {', '.join(extra)}")
    parts: list[list[tuple[Path, int]]] = []
    notes: tuple[str, ...] = ()
    for folder in (train, test):
        files, others = labelled_files(folder, names) if folder is not None else ([], [])
        parts.append(files)
        notes += ignored(others, folder) if folder is not None else ()
    if lacking := _without(parts[0], names):
        raise UsageError("; ".join((f"{train}: Found no valid file for the classes {named(lacking)}", *notes)))
    files = parts[0] + parts[1]
    sources: list[Source] = [file_source(path) for path, _ in files]
    images, kept, unreadable = decode(sources, side, skip_unreadable)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)[kept]
    if lacking := _without([files[i] for i in kept.tolist() if i < len(parts[0])], names):
        raise UsageError(f"No readable image is left of {named(lacking)}")
    cut = int((kept < len(parts[0])).sum())
    return Raw(
        (images[:cut], labels[:cut]),
        (images[cut:], labels[cut:]) if test is not None else None,
        tuple(names),
        f"{place} has train/, but none of {', '.join(f'{n}/' for n in TEST)} with class folders",
        notes + unreadable,
    )


def _without(files: list[tuple[Path, int]], names: list[str]) -> list[str]:
    """The classes that have no file."""
    found = {label for _, label in files}
    return [name for label, name in enumerate(names) if label not in found]


def class_folders(folder: Path) -> list[str]:
    """The class folders: all that are not hidden, such as those that Jupyter and file managers leave behind.

    Raises:
        UsageError: a name cannot be written into a file.
    """
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if any("\ud800" <= character <= "\udfff" for character in name):  # how Python reads other bytes
            raise UsageError(f"the class folder {name!a} in {folder} has a name that is no text of UTF-8; rename it")
    return names


def labelled_files(folder: Path, names: list[str]) -> tuple[list[tuple[Path, int]], list[Path]]:
    """The images with their labels, in torchvision's order, and what else is there."""
    images: list[tuple[Path, int]] = []
    others = [folder / e.name for e in os.scandir(folder) if not e.is_dir() or e.name.startswith(".")]
    for label, name in enumerate(names):
        for parent, folders, entries in sorted(_walk(folder / name), key=lambda found: found[0]):
            others += [Path(parent, unread) for unread in folders if not _is_read(Path(parent, unread))]
            for entry in sorted(entries):
                path = Path(parent, entry)
                if path.suffix.lower() in extensions() and not entry.startswith("."):
                    images.append((path, label))
                else:
                    others.append(path)
    return images, sorted(others)


def _walk(folder: Path) -> list[tuple[str, list[str], list[str]]]:
    """`os.walk` without what is below folders that are not read, which are listed in their parents."""
    found = []
    for parent, folders, entries in os.walk(folder, followlinks=True):
        found.append((parent, list(folders), entries))
        folders[:] = [name for name in folders if _is_read(Path(parent, name))]
    return found


def _is_read(folder: Path) -> bool:
    """Whether a folder is neither hidden nor a link to one that it lies in, which would be read over and over."""
    return not folder.name.startswith(".") and not (
        folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())
    )
