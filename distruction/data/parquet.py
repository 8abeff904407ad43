"""Parquet files as the Hugging Face hub has them: encoded images in one column, integer labels in another."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..extras import needed
from .raw import Raw, Source, decode, ignored, named

_TEST = ("test", "val")
_IMAGES = ("img", "image")
_LABELS = ("label", "labels", "fine_label")


def holds(place: Path) -> bool:
    """Whether there are Parquet files of a training part in ``place`` or up to two folders below."""
    return bool(_files(place, "train"))


def read(place: Path, side: int | None, skip_unreadable: bool) -> Raw:
    """The two parts, in the order of the files' names and rows; the test part is the first one that has labels.

    Raises:
        UsageError: pyarrow is not installed, the training part has no rows or no labels, a file is damaged or has other
            columns, or an image cannot be read.
    """
    files = _files(place, "train")
    train = [_read(path) for path in files]
    if not any(shard.labels for shard in train):
        lacking = "labels" if any(shard.rows for shard in train) else "rows"
        raise UsageError(
            f"the Parquet files in {place} have no {lacking} in the training part ({named(map(str, files))})"
        )
    test: list[_Shard] = []
    reasons = []
    for prefix in _TEST:
        found = _files(place, prefix)
        files += found
        shards = [_read(path) for path in found if not test]
        if any(shard.labels for shard in shards):
            test = shards
        elif shards:
            reasons.append(f"the labels of {named(str(p) for p in found)} are all missing or -1")
    if not reasons:
        reasons = [f"{place} has Parquet files, but none whose name or folder starts with test or val"]
    names: tuple[str, ...] | None = None
    for shard in [*train, *test]:
        if shard.rows and not shard.labels:
            raise UsageError(f"{shard.path} has no labels, unlike other files of its part; keep it apart")
        if names is not None and shard.names is not None and shard.names != names:
            raise UsageError(f"{shard.path} has other class names than the files before it; keep data sets apart")
        names = names or shard.names
    images, kept, unreadable = decode([s for shard in [*train, *test] for s in shard.sources()], side, skip_unreadable)
    labels = torch.tensor([n for shard in [*train, *test] for n in shard.labels], dtype=torch.int64)[kept]
    if names is None:
        names = tuple(map(str, range(int(labels.max()) + 1 if len(labels) else 0)))
    cut = int((kept < sum(len(shard.labels) for shard in train)).sum())
    others = [path for path in _all(place) if path not in files]
    return Raw(
        (images[:cut], labels[:cut]),
        (images[cut:], labels[cut:]) if test else None,
        names,
        "; ".join(reasons),
        ignored(others, place) + unreadable,
    )


def _all(place: Path) -> list[Path]:
    """The Parquet files in ``place`` or up to two folders below, but hidden ones."""
    found = {p for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet") for p in place.glob(pattern)}
    return sorted(p for p in found if not any(n.startswith(".") for n in p.relative_to(place).parts))


def _files(place: Path, prefix: str) -> list[Path]:
    """``train-00000-of-00001.parquet``, ``data/train-0.parquet``, ``default/train/0000.parquet`` and the like."""
    return [p for p in _all(place) if any(n.startswith(prefix) for n in p.relative_to(place).parts[-2:])]


@dataclass(frozen=True)
class _Shard:
    """One file: its images are not decoded yet; no label at all means that it has none for any of its rows."""

    path: Path
    rows: list[Any]
    labels: list[int]
    names: tuple[str, ...] | None

    def sources(self) -> Iterator[Source]:
        """The encoded images with labels."""
        for row, value in enumerate(self.rows[: len(self.labels)]):
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                raise UsageError(
                    f"{self.path}, row {row}: no image bytes or no label; the images must be inside the file"
                )
            yield f"{self.path}, row {row}", functools.partial(bytes, content)


def _read(path: Path) -> _Shard:
    """Images, labels and, where the file says so, class names."""
    with needed("parquet", path):
        import pyarrow
        import pyarrow.parquet
    try:
        schema = pyarrow.parquet.read_schema(path)
        image, label = (_column(path, schema.names, names) for names in (_IMAGES, _LABELS))
        table = pyarrow.parquet.read_table(path, columns=[image, label])
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}; get it again") from error
    kind = schema.field(label).type
    if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_null(kind)):
        raise UsageError(f"{path}: the column {label} holds {kind}, not integer class numbers")
    rows, labels = table[image].to_pylist(), table[label].to_pylist()
    if all(number in (None, -1) for number in labels):
        labels = []
    elif None in labels:
        row = labels.index(None)
        raise UsageError(f"{path}, row {row}: no image bytes or no label; the images must be inside the file")
    return _Shard(path, rows, labels, _names(schema.metadata or {}, label))


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
