"""Labelled images in tables, for requests: Parquet files, and folders of the datasets library's ``save_to_disk``.

Labels are read at once, images where they are asked for: those of Parquet files are copied out of their compressed
blocks, of which nothing can be read alone (see `distruction.data.encoded.Spool`); those of ``save_to_disk`` are read
from the mapped file. Nothing is put into a cache folder that would outlive the request.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..extras import needed
from . import parquet
from .encoded import Encoded, Spool, Spooled
from .raw import Source, ignored, named

PARTS = {"train": ("train",), "test": ("test", "val")}


@dataclass(frozen=True)
class Table:
    """The rows of one part.

    Attributes:
        where: the file or folder.
        part: ``train``, ``test`` or, where there are no parts, empty.
        labels: of each row, a number or a name; ``None`` where it has none.
        names: of the numbers.
        files: what each row calls its image, where it calls it anything.
        read: the images of these rows.
        notes: what is there and is not read.
        others: how many files these are.
    """

    where: Path
    part: str
    labels: Sequence[int | str | None]
    names: tuple[str, ...] | None
    files: Sequence[str | None]
    read: Callable[[Sequence[int]], Encoded] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()
    others: int = 0

    def label(self, row: int) -> str | None:
        """The class of a row as a name, or as a number where the table has no names."""
        label = self.labels[row]
        if label is None or label == -1:
            return None
        if isinstance(label, int) and self.names is not None:
            if not 0 <= label < len(self.names):
                raise UsageError(
                    f"{self.where}, row {row}: the label {label} is none of the {len(self.names)} classes that the "
                    f"table names: {named(self.names, 20)}"
                )
            return self.names[label]
        return str(label)


def holds(place: Path) -> bool:
    """Whether it is a Parquet file, or a folder of Parquet files or of ``save_to_disk``."""
    if place.is_file():
        return place.suffix == ".parquet"
    return place.is_dir() and (_is_saved(place) or bool(parquet.files_in(place)))


def open_table(place: Path, part: str) -> Table:
    """The rows of ``place``: of a part where it has parts, else all.

    Args:
        part: ``train`` or ``test``; ``val...`` takes the place of a test part that is missing or has no labels.

    Raises:
        MissingPackage: pyarrow or datasets is not installed.
        UsageError: a file is damaged or has no images, or the part is missing.
    """
    return _saved(place, part) if _is_saved(place) else _parquet(place, part)


def _is_saved(place: Path) -> bool:
    return (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()


def _no_test(place: Path, found: Sequence[str]) -> UsageError:
    return UsageError(
        f"{place} has {named(found)}, but no labelled part whose name starts with test or val; labelled test images "
        "are needed here"
    )


# --- Parquet ----------------------------------------------------------------------------------------------


def _parquet(place: Path, part: str) -> Table:
    every = [place] if place.is_file() else parquet.files_in(place)
    by_prefix = {p: parquet.files_in(place, p) if place.is_dir() else [] for ps in PARTS.values() for p in ps}
    if not any(by_prefix.values()):
        return _of_shards(place, "", [parquet.read_labels(path) for path in every], ())
    if part == "train":
        files = by_prefix["train"] or every
        return _of_shards(place, part, [parquet.read_labels(path) for path in files], _others(every, by_prefix))
    for prefix in PARTS["test"]:
        shards = [parquet.read_labels(path) for path in by_prefix[prefix]]
        if any(label not in (None, -1) for shard in shards for label in shard.labels):
            return _of_shards(place, part, shards, _others(every, by_prefix))
    raise _no_test(place, [str(p.relative_to(place)) for p in every])


def _others(every: Sequence[Path], by_prefix: dict[str, list[Path]]) -> list[Path]:
    """Files of no part."""
    return [p for p in every if not any(p in files for files in by_prefix.values())]


def _of_shards(place: Path, part: str, shards: "list[parquet.Labels]", others: Sequence[Path]) -> Table:
    names = None
    for shard in shards:
        if names is not None and shard.names is not None and shard.names != names:
            raise UsageError(f"{shard.path} has other class names than the files before it; keep data sets apart")
        names = names or shard.names

    def read(rows: Sequence[int]) -> Encoded:
        wanted = sorted(set(rows))
        called: list[str] = []

        def contents() -> Iterator[bytes]:
            first = 0
            for shard in shards:
                mine = [row - first for row in wanted if first <= row < first + len(shard.labels)]
                first += len(shard.labels)
                for row, content in parquet.images_of(shard, mine):
                    called.append(f"{shard.path}, row {row}")
                    yield content

        spool = Spool(contents())
        place_of = {row: i for i, row in enumerate(wanted)}
        return Spooled(spool, tuple(called), tuple(place_of[row] for row in rows))

    return Table(
        place,
        part,
        [label for shard in shards for label in shard.labels],
        names,
        [name for shard in shards for name in shard.files],
        read,
        ignored(others, place),
        len(others),
    )


# --- datasets ---------------------------------------------------------------------------------------------


def _saved(place: Path, part: str) -> Table:
    with needed("datasets", f"{place}, a folder of save_to_disk,"):
        import datasets
    try:
        found: Any = datasets.load_from_disk(str(place))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{place} cannot be read as a folder of save_to_disk: {reason}") from error
    if not isinstance(found, dict):
        return _of_saved(place, "", found)
    if part == "train":
        name = next((n for n in found if n.startswith("train")), None)
        if name is None:
            raise UsageError(f"{place} has the parts {named(found)}, and none is called train: name one by its folder")
        return _of_saved(place, name, found[name])
    for prefix in PARTS["test"]:
        for name in (n for n in found if n.startswith(prefix)):
            table = _of_saved(place, name, found[name])
            if any(label not in (None, -1) for label in table.labels):
                return table
    raise _no_test(place, list(found))


def _of_saved(place: Path, part: str, rows: Any) -> Table:
    import datasets

    image = _feature(rows, datasets.Image, parquet.IMAGES)
    if image is None or not isinstance(rows.features[image], datasets.Image):
        raise UsageError(f"{place} has no column of images; it has {', '.join(map(repr, rows.column_names))}")
    label = _feature(rows, datasets.ClassLabel, parquet.LABELS)
    names = getattr(rows.features[label], "names", None) if label is not None else None
    rows = rows.cast_column(image, datasets.Image(decode=False))
    labels = [None] * len(rows) if label is None else list(rows.select_columns([label])[label])
    if any(not isinstance(n, int | str | None) for n in labels):
        raise UsageError(f"{place}: the column {label} holds {rows.features[label]}, not one class of each row")
    return Table(
        place,
        part,
        labels,
        None if names is None else tuple(names),
        _Paths(rows, image),
        lambda chosen: Mapped(f"{place}, {part}" if part else str(place), rows, image, tuple(chosen)),
    )


def _feature(rows: Any, kind: type, names: Sequence[str]) -> str | None:
    """A column by its name, or else the only one of a kind."""
    of_kind = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    return next((n for n in names if n in rows.features), of_kind[0] if len(of_kind) == 1 else None)


@dataclass(frozen=True)
class _Paths(Sequence[Any]):
    """What each row calls its image, read when a record asks for it."""

    rows: Any
    image: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index][self.image]["path"]


@dataclass(frozen=True)
class Mapped:
    """Images of a data set that ``save_to_disk`` wrote."""

    where: str
    rows: Any = field(repr=False, compare=False)
    image: str
    positions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Source:
        row = self.positions[index]
        return f"{self.where}, row {row}", lambda: self._content(row)

    def _content(self, row: int) -> bytes:
        value = self.rows[row][self.image]
        if value is not None and isinstance(value["bytes"], bytes):
            content: bytes = value["bytes"]
            return content
        if value is not None and value["path"] and Path(value["path"]).is_file():
            return Path(value["path"]).read_bytes()
        raise UsageError(f"{self.where}, row {row}: no image; its bytes are not in the table, and no file is there")

    def take(self, positions: Sequence[int]) -> "Mapped":
        """The images at these positions."""
        return Mapped(self.where, self.rows, self.image, tuple(self.positions[i] for i in positions))
