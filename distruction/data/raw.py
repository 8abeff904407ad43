"""What the readers of the file formats return, and the decoding of image files."""

import functools
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..extras import needed

with needed("vision"):
    from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

Part = tuple[Tensor, Tensor]
"""Images, uint8 (N, channels, height, width), and labels, int64 (N,)."""

Source = tuple[str, Callable[[], bytes]]
"""An encoded image: its name for messages, and what reads it."""


@dataclass(frozen=True)
class Raw:
    """The two parts of a data set as a reader found them.

    Attributes:
        test: ``None`` where there is none, or none with labels.
        names: of the labels; ``None`` where the format has none.
        no_test: why there is no test part, and what would be one.
        notes: what was there and was not read, a sentence each.
    """

    train: Part
    test: Part | None
    names: tuple[str, ...] | None = None
    no_test: str = ""
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """A file format in which data sets come."""

    def holds(self, place: Path, /) -> bool:
        """Whether ``place`` looks like this format; reads no image."""

    def read(self, place: Path, side: int | None, skip_unreadable: bool, /) -> Raw:
        """Everything in ``place``; options as in `decode`. Raises `UsageError` for what is damaged or incomplete."""


@functools.cache
def extensions() -> frozenset[str]:
    """The endings of the image files that Pillow can read here, its plug-ins' included: lower case, with the dot."""
    endings = Image.registered_extensions()

    def is_read(format: str) -> bool:
        # MPO is opened as JPEG. Some formats are only written, others only recognised, as are films.
        factory = Image.OPEN["JPEG" if format == "MPO" else format][0] if format in {*Image.OPEN, "MPO"} else None
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        return factory is not None and not stub and format != "MPEG"

    return frozenset(ending for ending, format in endings.items() if is_read(format))


def named(names: Iterable[str], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def ignored(paths: Sequence[Path], where: Path) -> tuple[str, ...]:
    """A sentence that counts by kind the entries of ``where`` that were not read, or nothing."""
    if not paths:
        return ()

    def kind(path: Path) -> str:
        if path.name.startswith("."):
            return f"{path.name} (hidden)"
        return path.suffix.lower() or "without extension"

    counts = Counter(map(kind, paths)).most_common()
    text = named((f"{count} {what}" for what, count in counts), 12)
    return (f"{where}: not read: {text} ({named((str(p.relative_to(where)) for p in paths), 3)})",)


def decode(
    sources: Sequence[Source], side: int | None, skip_unreadable: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Pixels of image files: one channel if all are grey, else three; turned upright as their EXIF orientation says.

    Images that share one square size are kept as they are. Otherwise each is cropped to its central square and resized
    to ``side`` pixels (bicubic, antialiased), once.

    Args:
        skip_unreadable: leave out an image that is damaged or has more than 8 bits, instead of stopping.

    Returns:
        uint8 (N, channels, height, width); the positions of these N in ``sources``; what was left out.

    Raises:
        UsageError: an image cannot be read, the sizes differ and ``side`` is None, or the pixels do not fit into
            memory.
    """
    reasons: dict[int, str] = {}

    def attempt(position: int, read: Callable[[Source], Any]) -> Any:
        try:
            return read(sources[position])
        except UsageError as error:
            if not skip_unreadable:
                raise UsageError(
                    f"{error}; mend or remove it, or leave such images out by --skip-unreadable (skip_unreadable=True)"
                ) from error
            reasons[position] = str(error)
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kinds = [k for k in pool.map(lambda i: attempt(i, _kind), range(len(sources))) if k is not None]
        channels = 1 if all(grey for _, grey in kinds) else 3
        sizes = {size for size, _ in kinds}
        if not sizes:
            side, resize = side or 1, False
        elif len(sizes) == 1 and (width_height := next(iter(sizes)))[0] == width_height[1]:
            side, resize = width_height[0], False
        elif side is None:
            few = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:3])
            raise UsageError(
                f"the images ({sources[0][0]}, ...) are not of one square size but {few}{', ...' * (len(sizes) > 3)}; "
                "pass the model's input size (img_size) to have them cropped and resized"
            )
        else:
            resize = True
        _check_memory(len(kinds) * channels * side * side)
        readable = [i for i in range(len(sources)) if i not in reasons]
        pixels = np.empty((len(readable), channels, side, side), np.uint8)

        def fill(row: int) -> None:
            found = attempt(readable[row], lambda source: pixels_of(source, channels, side if resize else None))
            if found is not None:
                pixels[row] = found

        for _ in pool.map(fill, range(len(readable))):
            pass
    kept = torch.tensor([i not in reasons for i in readable], dtype=torch.bool)
    notes = (f"left out as unreadable: {named(reasons[i] for i in sorted(reasons))}",) if reasons else ()
    images = torch.from_numpy(pixels)
    return images if kept.all() else images[kept], torch.tensor(readable, dtype=torch.int64)[kept], notes


def file_source(path: Path) -> Source:
    """An image file; a pipe or a device with such a name would be waited for without end, so that it is refused."""

    def content() -> bytes:
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is no regular file")
        return path.read_bytes()

    return str(path), content


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
    except UnidentifiedImageError as error:  # whose text has an address in it
        raise UsageError(f"{name} is no image, or is damaged: Pillow does not know its format") from error
    # A damaged PNG raises a SyntaxError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{name} is no image, or is damaged: {error}") from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Damaged EXIF data raises nearly anything; the pixels are whole nevertheless.
        return None


def _kind(source: Source) -> tuple[tuple[int, int], bool]:
    """Size when upright, and whether it is grey."""
    with _open(source) as image:
        width, height = image.size
        # Asking a PNG for its orientation decodes it.
        if width != height and _turn(image) in (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]):
            width, height = height, width
        return (width, height), image.mode in ("1", "L")


def pixels_of(source: Source, channels: int, side: int | None) -> np.ndarray:
    """An image as bytes, (channels, height, width), upright; cropped and resized to ``side`` where that is given.

    Raises:
        UsageError: it cannot be read.
    """
    image = upright(source, "L" if channels == 1 else "RGB")
    if side is not None:
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def upright(source: Source, mode: str) -> Image.Image:
    """An image in Pillow's ``mode``, turned as its EXIF orientation says.

    Raises:
        UsageError: it cannot be read.
    """
    with _open(source) as file:
        turn = _turn(file)
        image = file.convert(mode)
    return image if turn is None else image.transpose(turn)


def _check_memory(needed: int) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        raise UsageError(
            f"the images need {needed / 2**30:.1f} GiB of memory as uint8, but the machine has "
            f"{total / 2**30:.1f} GiB; take fewer images or a smaller img_size"
        )
