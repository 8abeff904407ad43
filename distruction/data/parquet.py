"""Parquet files as the Hugging Face hub has them: encoded images in one column, integer labels in another."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from ..errors import UsageError
from ..extras import needed
from .raw import Raw, Source, decode, ignored, named

_TEST = ("test", "val")
IMAGES = ("img", "image")
"""Names of the column of images."""
LABELS = ("label", "labels", "fine_label")
"""Names of the column of labels."""
ROWS_AT_ONCE = 64


def holds(place: Path) -> bool:
    """Whether there are Parquet files of a training part in ``place`` or up to two folders below."""
    return bool(files_in(place, "train"))


def read(place: Path, side: int | None, skip_unreadable: bool) -> Raw:
    """The two parts, in the order of the files' names and rows; the test part is the first one that has labels.

    Raises:
        UsageError: pyarrow is not installed, the training part has no rows or no labels, a file is damaged or has other
            columns, or an image cannot be read.
    """
    files = files_in(place, "train")
    train = [_read(path) for path in files]
    if not any(shard.labels for shard in train):
        lacking = "labels" if any(shard.rows for shard in train) else "rows"
        raise UsageError(
            f"the Parquet files in {place} have no {lacking} in the training part ({named(map(str, files))})"
        )
    test: list[_Shard] = []
    reasons = []
    for prefix in _TEST:
        found = files_in(place, prefix)
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
    others = [path for path in files_in(place) if path not in files]
    return Raw(
        (images[:cut], labels[:cut]),
        (images[cut:], labels[cut:]) if test else None,
        names,
        "; ".join(reasons),
        ignored(others, place) + unreadable,
    )


def files_in(place: Path, prefix: str = "") -> list[Path]:
    """The Parquet files in ``place`` or up to two folders below, but hidden ones; of one part where it is named.

    ``train-00000-of-00001.parquet``, ``data/train-0.parquet``, ``default/train/0000.parquet`` and the like.
    """
    found = {p for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet") for p in place.glob(pattern)}
    inner = {p: p.relative_to(place).parts for p in found}
    return sorted(
        p
        for p, parts in inner.items()
        if not any(n.startswith(".") for n in parts) and any(n.startswith(prefix) for n in parts[-2:])
    )


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
    with _told(path):
        schema = pyarrow.parquet.read_schema(path)
        image, label = (
            _column(path, schema, kind, names) for kind, names in (("Image", IMAGES), ("ClassLabel", LABELS))
        )
        table = pyarrow.parquet.read_table(path, columns=[image, label])
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


@dataclass(frozen=True)
class Labels:
    """One file without its images.

    Attributes:
        image: the name of their column.
        labels: numbers or names, a row each; ``None`` where there is none.
        files: what each row calls its image.
        names: of the numbers.
    """

    path: Path
    image: str
    labels: list[Any]
    files: list[str | None]
    names: tuple[str, ...] | None


def read_labels(path: Path) -> Labels:
    """All of a file but its images.

    Raises:
        MissingPackage: pyarrow is not installed.
        UsageError: it is damaged, has no column of images, or labels that are neither numbers nor names.
    """
    with needed("parquet", path):
        import pyarrow
        import pyarrow.parquet
    with _told(path):
        schema = pyarrow.parquet.read_schema(path)
        image = _column(path, schema, "Image", IMAGES)
        label = _column(path, schema, "ClassLabel", LABELS, needed=False)
        kind = schema.field(image).type
        inner = pyarrow.types.is_struct(kind) and any(f.name == "path" for f in kind)
        columns = [*([] if label is None else [label]), *([f"{image}.path"] if inner else [])]
        file = pyarrow.parquet.ParquetFile(path)
        count = file.metadata.num_rows
        table = file.read(columns)
    files = [row and row["path"] for row in table[image].to_pylist()] if inner else [None] * count
    if label is None:
        return Labels(path, image, [None] * count, files, None)
    kind = schema.field(label).type
    is_name = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    if not (is_name or pyarrow.types.is_integer(kind) or pyarrow.types.is_null(kind)):
        raise UsageError(f"{path}: the column {label} holds {kind}, neither class numbers nor names")
    return Labels(path, image, table[label].to_pylist(), files, _names(schema.metadata or {}, label))


def images_of(shard: Labels, rows: list[int]) -> Iterator[tuple[int, bytes]]:
    """These rows' encoded images, the rows ascending; a few blocks of the file are in memory at a time.

    Raises:
        UsageError: a row has no image, or the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    with _told(shard.path):
        file = pyarrow.parquet.ParquetFile(shard.path)
        first = wanted = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            until = wanted
            while until < len(rows) and rows[until] < first + size:
                until += 1
            chosen, start = set(rows[wanted:until]), first
            wanted, first = until, first + size
            if not chosen:
                continue
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[shard.image]):
                for offset in range(batch.num_rows):
                    if start + offset in chosen:
                        value = batch.column(0)[offset].as_py()
                        content = value.get("bytes") if isinstance(value, dict) else value
                        if not isinstance(content, bytes):
                            row = f"{shard.path}, row {start + offset}"
                            raise UsageError(f"{row}: no image bytes; the images must be inside the file")
                        yield start + offset, content
                start += batch.num_rows


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say of pyarrow's errors which file they are about."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}; get it again") from error


@overload
def _column(path: Path, schema: Any, kind: str, wanted: tuple[str, ...]) -> str: ...
@overload
def _column(path: Path, schema: Any, kind: str, wanted: tuple[str, ...], *, needed: bool) -> str | None: ...
def _column(path: Path, schema: Any, kind: str, wanted: tuple[str, ...], *, needed: bool = True) -> str | None:
    """A column by its name, or else the only one that the datasets library says is of a kind."""
    name = next((n for n in wanted if n in schema.names), None)
    of_kind = [n for n, f in _features(schema.metadata or {}).items() if f.get("_type") == kind and n in schema.names]
    if name is None and len(of_kind) == 1:
        return of_kind[0]
    if name is None and needed:
        raise UsageError(f"{path} has no column {' or '.join(wanted)}; it has {', '.join(schema.names)}")
    return name


def _features(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    """The features of the columns, from the metadata that the datasets library writes."""
    try:
        features: Any = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {str(n): f for n, f in features.items() if isinstance(f, dict)}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """The names of a ``ClassLabel`` feature."""
    try:
        return tuple(map(str, _features(metadata)[label]["names"]))
    except (KeyError, TypeError):
        return None
