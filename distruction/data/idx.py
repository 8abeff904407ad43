"""IDX files, the format of MNIST and its kin: a magic number, big-endian sizes, bytes; plain or gzipped.

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747) comes in MNIST's file names.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .raw import Part, Raw

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_UBYTE = 0x08


def holds(folder: Path) -> bool:
    """Whether ``folder`` has any of the four usual files."""
    return any(_locate(folder, name) for pair in _FILES.values() for name in pair)


def read(folder: Path, side: int | None = None, skip_unreadable: bool = False) -> Raw:
    """The two parts; images of one channel. The options are of no use here.

    Raises:
        UsageError: a file is missing, damaged, or does not fit its partner; the whole test part may be missing.
    """
    train = _part(folder, *_FILES["train"])
    if not any(_locate(folder, name) for name in _FILES["test"]):
        return Raw(train, None, None, f"{folder} has no {' and no '.join(_FILES['test'])}, plain or gzipped")
    return Raw(train, _part(folder, *_FILES["test"]))


def array(path: Path) -> Tensor:
    """The uint8 array of one file.

    Raises:
        UsageError: it is not an IDX file of unsigned bytes, or is truncated.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"{path} is damaged: {error}; get it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UBYTE:
        raise UsageError(
            f"{path} is not an IDX file of unsigned bytes: it starts with {content[:4].hex(' ') or 'nothing'}, "
            "expected 00 00 08 and the number of dimensions"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise UsageError(f"{path} is truncated: its header ends after {len(content)} bytes; get it again")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise UsageError(
            f"{path} is damaged: its header promises {' x '.join(map(str, shape))} bytes, "
            f"but {len(content) - start} follow; get it again"
        )
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8, offset=start).reshape(shape))


def _part(folder: Path, images_name: str, labels_name: str) -> Part:
    paths = []
    for name in (images_name, labels_name):
        path = _locate(folder, name)
        if path is None:
            raise UsageError(f"{folder} has no {name} and no {name}.gz, but other files of the data set; get it again")
        paths.append(path)
    images, labels = map(array, paths)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UsageError(
            f"{paths[0]} and {paths[1]} do not belong together: "
            f"images {tuple(images.shape)}, labels {tuple(labels.shape)}"
        )
    return images[:, None], labels.long()


def _locate(folder: Path, name: str) -> Path | None:
    """The file, plain or gzipped; some unpackers write a dot for the last hyphen but one."""
    stem = name.replace("-idx", ".idx")
    return next((p for n in (name, f"{name}.gz", stem, f"{stem}.gz") if (p := folder / n).is_file()), None)
