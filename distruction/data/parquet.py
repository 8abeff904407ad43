"""Parquet files as the Hugging Face hub has them: encoded images in one column, integer labels in another."""

import functools
import json
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from .raw import Raw, Source, decode

_PARTS = {"train": ("train",), "test": ("test", "val")}
_IMAGES = ("img", "image")
_LABELS = ("label", "labels", "fine_label")


def holds(place: Path) -> bool:
    """Whether there are Parquet files of a training part in ``place`` or up to two folders below."""
    return bool(_files(place, "train"))


def read(place: Path, side: int | None) -> Raw:
    """The two parts, in the order of the files' names and rows.

    Raises:
        UsageError: pyarrow is not installed, a part is missing, a file is damaged or has other columns, or an image
            cannot be read.
    """
    sources: list[Source] = []
    labels: list[int] = []
    counts: list[int] = []
    names: tuple[str, ...] | None = None
    for part in _PARTS:
        files = _files(place, part)
        if not files:
            raise UsageError(f"{place} has Parquet files, but none whose name or folder starts with {part}")
        for path in files:
            images, numbers, found = _read(path)
            sources += images
            labels += numbers
            if names is not None and found is not None and found != names:
                raise UsageError(f"{path} has other class names than the files before it; keep data sets apart")
            names = names or found
        counts.append(len(labels))
    if not labels:
        raise UsageError(f"the Parquet files in {place} have no rows")
    pixels, targets = decode(sources, side), torch.tensor(labels, dtype=torch.int64)
    if names is None:
        names = tuple(map(str, range(int(targets.max()) + 1)))
    cut = counts[0]
    return Raw((pixels[:cut], targets[:cut]), (pixels[cut:], targets[cut:]), names)


def _files(place: Path, part: str) -> list[Path]:
    """``train-00000-of-00001.parquet``, ``data/train-0.parquet``, ``default/train/0000.parquet`` and the like."""
    everything = [p for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet") for p in place.glob(pattern)]
    for prefix in _PARTS[part]:
        found = [p for p in everything if any(n.startswith(prefix) for n in p.relative_to(place).parts[-2:])]
        if found:
            return sorted(found)
    return []


def _read(path: Path) -> tuple[list[Source], list[int], tuple[str, ...] | None]:
    """Images, labels and, where the file says so, class names."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"{path} needs pyarrow to be read: pip install 'distruction[parquet]'") from error
    try:
        schema = pyarrow.parquet.read_schema(path)
        image, label = (_column(path, schema.names, names) for names in (_IMAGES, _LABELS))
        table = pyarrow.parquet.read_table(path, columns=[image, label])
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}; get it again") from error
    if not pyarrow.types.is_integer(schema.field(label).type):
        raise UsageError(f"{path}: the column {label} holds {schema.field(label).type}, not integer class numbers")
    rows, numbers = table[image].to_pylist(), table[label].to_pylist()
    sources: list[Source] = []
    for row, (value, number) in enumerate(zip(rows, numbers, strict=True)):
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes) or number is None:
            raise UsageError(f"{path}, row {row}: no image bytes or no label; the images must be inside the file")
        sources.append((f"{path}, row {row}", functools.partial(bytes, content)))
    return sources, numbers, _names(schema.metadata or {}, label)


def _column(path: Path, found: list[str], wanted: tuple[str, ...]) -> str:
    name = next((n for n in wanted if n in found), None)
    if name is None:
        raise UsageError(f"{path} has no column {' or '.join(wanted)}; it has {', '.join(found)}")
    return name


def _names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """The names of a ``ClassLabel`` feature, from the metadata that the datasets library writes."""
    try:
        features: Any = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return None
