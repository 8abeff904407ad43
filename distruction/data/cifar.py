"""CIFAR's Python archives (Krizhevsky 2009): folders of pickled batches, or their .tar.gz, read without running code.

A batch is a dictionary with ``data``, uint8 (N, 3072), the red, green and blue plane of each image one after the other,
and lists of labels.
"""

import math
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..errors import UsageError
from . import names
from .raw import Part, Raw


class _Dtype:
    """Stands for ``numpy.dtype``; the archives hold bytes only."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        if code not in ("u1", "|u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of type {code!r} instead of u1")

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for ``numpy.ndarray``."""

    value = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(dtype, _Dtype) or fortran or len(content) != math.prod(shape):
            raise pickle.UnpicklingError(f"an array of shape {shape} with {len(content)} bytes")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"a string encoded as {encoding}")
    return text.encode("latin1")


class _Unpickler(pickle._Unpickler):
    """Builds dictionaries, lists, strings, numbers and arrays of bytes; nothing that a pickle names is imported.

    Written in Python, because the one in C allocates a table of any size that a damaged file asks for.
    """

    # That opcode allocates what it is asked for, too.
    dispatch: ClassVar = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    _STANDINS: ClassVar[Mapping[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for ``module.name``."""
        if (module, name) not in self._STANDINS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR's files never do")
        return self._STANDINS[module, name]


@dataclass(frozen=True)
class Archive:
    """One of the two archives; a `raw.Format`.

    Attributes:
        folder: in the archive.
        archive: its name.
        train, test: files of the batches.
        meta: file of the class names.
        labels: key of the labels in a batch, and of their names in ``meta``.
        classes: the official names.
    """

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: tuple[str, str]
    classes: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read."""
        return (*self.train, *self.test, self.meta)

    def holds(self, place: Path) -> bool:
        """Whether ``place`` is the folder, the archive, or holds one of them."""
        return self._locate(place) is not None

    def read(self, place: Path, side: int | None = None, skip_unreadable: bool = False) -> Raw:
        """The two parts, in the archive's order, and the names in ``meta``. The options are of no use here.

        Raises:
            UsageError: a file is missing or damaged, asks for code, or has other classes or labels than CIFAR's; those
                of the test part may be missing.
        """
        where = self._locate(place)
        assert where is not None
        batches = _archive(where, self.folder, self.files) if where.is_file() else _folder(where, self.files)
        missing = [name for name in self.files if name not in batches]
        if set(missing) - set(self.test):
            raise UsageError(f"{where} has no {', '.join(missing)}; get {self.archive} again")
        found = batches[self.meta].get(self.labels[1])
        if found != list(self.classes):
            raise UsageError(f"{where}: {self.meta} has other {self.labels[1]} than {self.archive}; get it again")
        train, test = (
            self._part([batches[name] for name in part], f"{where}, {', '.join(part)}") if part else None
            for part in (self.train, () if missing else self.test)
        )
        assert train is not None
        no_test = f"{where} has no {', '.join(missing)}; get {self.archive} again" if missing else ""
        return Raw(train, test, self.classes, no_test)

    def _locate(self, place: Path) -> Path | None:
        if place.is_file():
            return place if place.name.startswith(self.archive.split(".")[0]) else None
        if place.name == self.folder or any((place / name).is_file() for name in (self.meta, *self.test)):
            return place if place.is_dir() else None
        inside = (place / self.folder, place / self.archive)
        return next((p for p in inside if p.exists()), None)

    def _part(self, batches: list[dict[str, Any]], where: str) -> Part:
        images, labels = [], []
        for batch in batches:
            data, numbers = batch.get("data"), batch.get(self.labels[0])
            if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072:
                raise UsageError(f"{where}: data is not a uint8 array (N, 3072); get {self.archive} again")
            if not isinstance(numbers, list) or len(numbers) != len(data) or not all(type(n) is int for n in numbers):
                raise UsageError(
                    f"{where}: {self.labels[0]} is not a list of {len(data)} integers; get {self.archive} again"
                )
            coarse = batch.get("coarse_labels")
            if coarse is not None and coarse != [_COARSE[n] for n in numbers if 0 <= n < len(_COARSE)]:
                raise UsageError(f"{where}: coarse_labels do not belong to fine_labels; get {self.archive} again")
            images.append(data.reshape(-1, 3, 32, 32))
            labels += numbers
        return torch.from_numpy(np.concatenate(images)), torch.tensor(labels, dtype=torch.int64)


_COARSE = [next(i for i, fine in enumerate(names.CIFAR20.values()) if c in fine) for c in names.CIFAR100]

CIFAR10 = Archive(
    "cifar-10-batches-py",
    "cifar-10-python.tar.gz",
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    ("test_batch",),
    "batches.meta",
    ("labels", "label_names"),
    names.CIFAR10,
)
CIFAR100 = Archive(
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    ("train",),
    ("test",),
    "meta",
    ("fine_labels", "fine_label_names"),
    names.CIFAR100,
)


def _folder(folder: Path, files: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in files:
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                found[name] = _unpickle(file, folder / name)
    return found


def _archive(path: Path, folder: str, files: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.removeprefix("./").removeprefix(f"{folder}/")
                content = archive.extractfile(member) if name in files and member.isfile() else None
                if content is not None:
                    found[name] = _unpickle(content, path / name)
            # gzip's checksum is behind the last member, where tarfile does not look.
            while archive.fileobj and archive.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UsageError(f"{path} is damaged: {error}; get it again") from error
    return found


def _unpickle(file: Any, path: Path) -> dict[str, Any]:
    """The dictionary of one file; its keys as strings, its arrays as NumPy's.

    Raises:
        UsageError: it is damaged, or asks for anything but arrays of bytes.
    """
    try:
        content = _Unpickler(file, encoding="latin1").load()
    except Exception as error:
        # A damaged pickle raises nearly anything.
        raise UsageError(f"{path} is damaged, or no batch of CIFAR: {error}; get it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a dictionary; get it again")
    return {_plain(key): _plain(value) for key, value in content.items()}


def _plain(value: Any) -> Any:
    """Bytes as text, in a list too, and an array as NumPy's."""
    if isinstance(value, list):
        return [_text(v) for v in value]
    return value.value if isinstance(value, _Array) else _text(value)


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value
