"""What the readers of the file formats return, and the decoding of image files."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UsageError

Part = tuple[Tensor, Tensor]
"""Images, uint8 (N, channels, height, width), and labels, int64 (N,)."""

Source = tuple[str, Callable[[], bytes]]
"""An encoded image: its name for messages, and what reads it."""


@dataclass(frozen=True)
class Raw:
    """The two parts of a data set as a reader found them.

    Attributes:
        names: of the labels; ``None`` where the format has none.
    """

    train: Part
    test: Part
    names: tuple[str, ...] | None = None


class Format(Protocol):
    """A file format in which data sets come."""

    def holds(self, place: Path, /) -> bool:
        """Whether ``place`` looks like this format; reads no image."""

    def read(self, place: Path, side: int | None, /) -> Raw:
        """Everything in ``place``; ``side`` as in `decode`. Raises `UsageError` for what is damaged or incomplete."""


def decode(sources: Sequence[Source], side: int | None) -> Tensor:
    """Pixels of image files, uint8 (N, channels, height, width): one channel if all are grey, else three.

    Images that share one square size are kept as they are. Otherwise each is cropped to its central square and resized
    to ``side`` pixels (bicubic, antialiased), once.

    Raises:
        UsageError: an image is damaged or has more than 8 bits, the sizes differ and ``side`` is None, or the pixels do
            not fit into memory.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kinds = list(pool.map(_kind, sources))
        channels = 1 if all(grey for _, grey in kinds) else 3
        sizes = {size for size, _ in kinds}
        if len(sizes) == 1 and (width_height := next(iter(sizes)))[0] == width_height[1]:
            side, resize = width_height[0], False
        elif side is None:
            few = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:3])
            raise UsageError(
                f"the images ({sources[0][0]}, ...) are not of one square size but {few}{', ...' * (len(sizes) > 3)}; "
                "pass the model's input size (img_size) to have them cropped and resized"
            )
        else:
            resize = True
        _check_memory(len(sources) * channels * side * side)
        pixels = np.empty((len(sources), channels, side, side), np.uint8)

        def fill(position: int) -> None:
            pixels[position] = _pixels(sources[position], channels, side if resize else None)

        for _ in pool.map(fill, range(len(sources))):
            pass
    return torch.from_numpy(pixels)


@contextmanager
def _open(source: Source) -> Iterator[Image.Image]:
    name, content = source
    try:
        with Image.open(io.BytesIO(content())) as image:
            if image.mode.startswith(("I", "F")):
                raise UsageError(f"{name} has pixels of mode {image.mode}; convert it to 8 bits per channel")
            yield image
    except UsageError:
        raise
    # UnidentifiedImageError is an OSError; a damaged PNG raises a SyntaxError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{name} is no image, or is damaged: {error}") from error


def _kind(source: Source) -> tuple[tuple[int, int], bool]:
    """Size, and whether it is grey."""
    with _open(source) as image:
        return image.size, image.mode in ("1", "L")


def _pixels(source: Source, channels: int, side: int | None) -> np.ndarray:
    with _open(source) as file:
        image = file.convert("L" if channels == 1 else "RGB")
    if side is not None:
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _check_memory(needed: int) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        raise UsageError(
            f"the images need {needed / 2**30:.1f} GiB of memory as uint8, but the machine has "
            f"{total / 2**30:.1f} GiB; take fewer images or a smaller img_size"
        )
