"""Which examples a request is for: class folders, a flat folder, rows of tables, lists of records, parts of data sets.

Classes are matched with the model's by name, so that a folder means the same whatever lies beside it.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataWarning, UsageError
from . import sets
from .encoded import Encoded, Files
from .folder import TEST, class_folders, labelled_files
from .images import Images, forget_split
from .inputs import Data, Inputs, Pixels, read_images
from .raw import extensions, ignored, named
from .records import Record, read_records
from .tables import Table


@dataclass(frozen=True)
class Selection:
    """Examples that were found, before any image is decoded.

    Attributes:
        labels: numbers in the model's head.
        classes: the model's.
        encoded: image files, or rows of a table; or ``None``.
        images: of a data set in memory; or ``None``.
        notes: what was there and is not read, a sentence each.
        others: how many files these are.
    """

    labels: tuple[int, ...]
    classes: tuple[str, ...]
    encoded: Encoded | None = None
    images: Images | None = None
    notes: tuple[str, ...] = ()
    others: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Examples by class."""
        return {self.classes[label]: n for label, n in Counter(self.labels).most_common()}

    def __str__(self) -> str:
        counts = self.counts
        of = named((f"{n:,} {name}" for name, n in counts.items()), 12)
        text = f"{len(self.labels):,} record{'s' * (len(self.labels) != 1)} of "
        text += f"{len(counts)} class{'es' * (len(counts) != 1)}: {of}"
        if not self.others:
            return text
        return f"{text}; {self.others} file{'s' * (self.others != 1)} ignored: {'; '.join(self.notes)}"

    def read(self, inputs: Inputs | None, *, skip_unreadable: bool = False) -> Data:
        """The examples, as the model takes them.

        Raises:
            UsageError: an image cannot be read, or it is not known how images are normalised.
        """
        if self.images is not None:
            return self.images
        assert self.encoded is not None
        if inputs is None:
            raise UsageError(
                "the model does not say how images become its inputs (size, mean, std): a file of an older version is "
                "to be trained again, a factory returns (model, transform)"
            )
        data, left_out = read_images(self.encoded, self.labels, self.classes, inputs, skip_unreadable=skip_unreadable)
        if left_out:
            warnings.warn(f"left out as unreadable: {named(left_out)}", DataWarning, stacklevel=2)
        return data


def known_class(name: str, classes: Sequence[str]) -> int:
    """The label of a class.

    Raises:
        UsageError: the model has no class of that name.
    """
    if name not in classes:
        raise UsageError(f"class {name!r} is unknown; the model's classes are {named(classes, 20)}")
    return list(classes).index(name)


def in_folder(
    root: Path, classes: Sequence[str], *, wanted: Sequence[str] = (), records: Path | None = None, part: str = "train"
) -> Selection:
    """The image files of a request.

    Args:
        root: a folder of class folders, a folder above ``train/`` (and ``test/``) with these, or of images alone.
        classes: the model's, in the order of its head.
        wanted: classes to take; none: all that are there.
        records: a file of `read_records`: paths relative to ``root`` or to the file's own folder.
        part: ``train``, or ``test`` for the part that was kept for testing.

    Raises:
        UsageError: there are no images, a folder or a name is no class of the model, a record is missing or labelled
            in two ways.
    """
    _check_wanted(wanted, classes)
    if not root.is_dir():
        raise UsageError(f"{root} is no folder of images" + ("" if root.exists() else ": it does not exist"))
    top = _top(root, part)
    if records is not None:
        return _of_records(read_records(records), [root, top, records.parent], classes, wanted, records)
    folders = class_folders(top)
    if unknown := [name for name in folders if name not in classes]:
        raise UsageError(
            f"{top} has folders that are no classes of the model: {named(unknown)}; its classes are "
            f"{named(classes, 20)}"
        )
    if folders:
        if lacking := [name for name in wanted if name not in folders]:
            raise UsageError(f"{top} has no folder {named(lacking)}; it has {named(folders, 20)}")
        taken = [name for name in folders if not wanted or name in wanted]
        files, others = labelled_files(top, taken)
        others = [p for p in others if p.parent != top]
        labels = [known_class(taken[label], classes) for _, label in files]
        empty = [name for i, name in enumerate(taken) if not any(label == i for _, label in files)]
        if empty and wanted:
            raise UsageError("; ".join((f"{top} has no image of {named(empty)}", *ignored(others, top))))
    else:
        if len(wanted) != 1:
            raise UsageError(
                f"{top} holds no class folders: name the one class of its images by --class (classes=); the model's "
                f"classes are {named(classes, 20)}"
            )
        entries = sorted(p for p in top.iterdir() if p.is_file())
        images = [p for p in entries if p.suffix.lower() in extensions() and not p.name.startswith(".")]
        files, others = [(p, 0) for p in images], [p for p in entries if p not in set(images)]
        labels = [known_class(wanted[0], classes)] * len(files)
    notes = ignored(others, top)
    if not files:
        raise UsageError("; ".join((f"{top} holds no images", *notes)))
    return Selection(tuple(labels), tuple(classes), Files(tuple(p for p, _ in files)), notes=notes, others=len(others))


def in_table(
    table: Table, classes: Sequence[str], *, wanted: Sequence[str] = (), records: Path | None = None
) -> Selection:
    """The rows of a request in a table.

    Args:
        classes: the model's, in the order of its head; a table without names has their numbers.
        wanted: classes to take; none: all that are there.
        records: a file of `read_records` with the part's row numbers, from 0, or with what it calls its images.

    Raises:
        UsageError: a label or a name is no class of the model, or a record is missing or labelled in two ways.
    """
    _check_wanted(wanted, classes)
    where = f"{table.where}, part {table.part}," if table.part else str(table.where)
    own = [table.label(row) for row in range(len(table.labels))]
    if unknown := sorted({n for n in own if n is not None and not _is_known(n, classes)}):
        raise UsageError(
            f"{where} has labels that are no classes of the model: {named(unknown)}; its classes are "
            f"{named(classes, 20)}"
        )
    given = [None if n is None else _name(n, classes) for n in own]
    if records is not None:
        rows, labels = [], []
        for record in read_records(records):
            row = _table_row(record, table, where, records)
            if row in rows:
                raise UsageError(f"{records} names row {row} of {where} twice")
            rows.append(row)
            labels.append(_one_label(record, given[row], classes, wanted, records, where))
    elif any(n is not None for n in given) or not given:
        rows = [row for row, n in enumerate(given) if n is not None and (not wanted or n in wanted)]
        if lacking := [n for n in wanted if n not in given]:
            there = named(dict.fromkeys(n for n in given if n is not None), 20) or "nothing"
            raise UsageError(f"{where} has no rows of {named(lacking)}; it has {there}")
        labels = [known_class(name, classes) for row in rows if (name := given[row]) is not None]
    elif len(wanted) == 1:
        rows, labels = list(range(len(given))), [known_class(wanted[0], classes)] * len(given)
    else:
        raise UsageError(
            f"{where} has no labels: name the one class of its images by --class (classes=); the model's classes are "
            f"{named(classes, 20)}"
        )
    if not rows:
        raise UsageError("; ".join((f"{where} holds no rows", *table.notes)))
    return Selection(tuple(labels), tuple(classes), table.read(rows), notes=table.notes, others=table.others)


def in_memory(
    images: Images, *, wanted: Sequence[str] = (), records: Path | None = None, where: str = "the data set"
) -> Selection:
    """The examples of a request in a data set that was loaded with the model's classes.

    Args:
        wanted: classes, fine ones included; none: all.
        records: a file of `read_records` with row numbers of the training part, from 0.

    Raises:
        UsageError: a class is unknown, or a row is not there or labelled in another way.
    """
    if records is not None:
        rows = [(_row_in(r, images, where, records), r) for r in read_records(records)]
        for row, record in rows:
            own = images.classes[int(images.labels[row])]
            if record.label is not None and _name(record.label, images.classes) != own:
                raise UsageError(f"{records} calls row {row} {record.label}, but {where} calls it {own}")
            if wanted and own not in wanted:
                raise UsageError(f"{records}: row {row} is of the class {own}, not of {named(wanted)}")
        images = images.subset(torch.tensor([row for row, _ in rows]))
    elif wanted:
        images, _ = forget_split(images, wanted)
    return Selection(tuple(images.labels.tolist()), images.classes, images=images)


def of_model(
    parts: Sequence[Images], classes: Sequence[str] | None, num_classes: int | None, inputs: Inputs | None, name: str
) -> list[Images]:
    """A data set's parts with the model's label numbers and normalisation.

    Raises:
        UsageError: it has classes that the model lacks, or images of another kind; says both sides.
    """
    own = parts[0].classes
    if classes is None:
        if num_classes is not None and len(own) != num_classes:
            raise UsageError(
                f"the model tells {num_classes} classes apart; the data set {name!r} has {len(own)}: {named(own)}; "
                "pass the data that it was trained on"
            )
        classes = own
    lacking = [c for c in own if c not in classes]
    if lacking:
        raise UsageError(
            f"the model tells {len(classes)} classes apart: {named(classes)}; the data set {name!r} has {len(own)}: "
            f"{named(own)}; pass the data that it was trained on"
        )
    if inputs is not None and not isinstance(inputs, Pixels):
        raise UsageError(
            f"the data set {name!r} holds its images as bytes in memory, and the model takes them through a transform "
            "of its own: pass a folder of image files by --data"
        )
    table = torch.tensor([list(classes).index(c) for c in own])
    found = []
    for part in parts:
        labels = part.labels if tuple(own) == tuple(classes) else table[part.labels]
        mine = replace(part, labels=labels, classes=tuple(classes))
        if inputs is not None:
            there, here = tuple(part.images.shape[1:]), (inputs.channels, inputs.side, inputs.side)
            if len(part) and there != here:
                raise UsageError(f"the model was trained on images of {here}, and those of {name!r} are {there}")
            mine = replace(mine, mean=inputs.mean, std=inputs.std)
        found.append(mine)
    return found


def load_quietly(
    name: str, root: Path | None, *, side: int | None, need_test: bool, skip_unreadable: bool
) -> tuple[Images, Images]:
    """`sets.load`, silent about a test part that nobody asked for."""
    with warnings.catch_warnings():
        if not need_test:
            warnings.filterwarnings("ignore", "no test images", DataWarning)
        return sets.load(name, root, side=side, need_test=need_test, skip_unreadable=skip_unreadable)


def _check_wanted(wanted: Sequence[str], classes: Sequence[str]) -> None:
    for name in wanted:
        known_class(name, classes)
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"name each class to forget once, not {', '.join(wanted)}")


def _top(root: Path, part: str) -> Path:
    """Where the class folders are."""
    if not class_folders(root / "train") and not any(class_folders(root / name) for name in TEST):
        return root
    if part == "train":
        return root / "train"
    found = next((root / name for name in TEST if class_folders(root / name)), None)
    if found is None:
        raise UsageError(
            f"{root} has train/, but none of {', '.join(f'{n}/' for n in TEST)} with class folders; labelled test "
            "images are needed here"
        )
    return found


def _of_records(
    records: list[Record], folders: list[Path], classes: Sequence[str], wanted: Sequence[str], where: Path
) -> Selection:
    paths, labels = [], []
    for record in records:
        if isinstance(record.place, int):
            raise UsageError(
                f"{where} names row {record.place}, but rows of a folder of images change when files are deleted: name "
                "the files by their paths"
            )
        tried = [folder / record.place for folder in dict.fromkeys(folders)]
        path = next((p for p in tried if p.is_file()), None)
        if path is None:
            raise UsageError(f"{where} names {record.place}, and there is no file {' or '.join(map(str, tried))}")
        label = _label_of(record, path, classes, wanted, where)
        paths.append(path)
        labels.append(label)
    return Selection(tuple(labels), tuple(classes), Files(tuple(paths)))


def _table_row(record: Record, table: Table, where: str, records: Path) -> int:
    """The row that a record means: by its number, or by what the table calls its image."""
    if isinstance(record.place, int):
        if not 0 <= record.place < len(table.labels):
            raise UsageError(
                f"{records} names row {record.place}, but {where} has the rows 0 to {len(table.labels) - 1}"
            )
        return record.place
    rows = [row for row, name in enumerate(table.files) if name == record.place]
    if len(rows) != 1:
        what = "calls no image so" if not rows else f"calls {len(rows)} images so"
        raise UsageError(f"{records} names {record.place}, but {where} {what}: give the numbers of rows, from 0")
    return rows[0]


def _label_of(record: Record, path: Path, classes: Sequence[str], wanted: Sequence[str], where: Path) -> int:
    folder = next((p.name for p in path.parents if p.name in classes), None)
    return _one_label(record, folder, classes, wanted, where, None)


def _one_label(
    record: Record, own: str | None, classes: Sequence[str], wanted: Sequence[str], where: Path, table: str | None
) -> int:
    """The label of a record, by what its list and its place (a folder, or a row of ``table``) say."""
    given = None if record.label is None else _name(record.label, classes)
    if own is not None and given is not None and own != given:
        there = f"it lies in the folder of {own}" if table is None else f"{table} calls it {own}"
        raise UsageError(f"{where} calls {record.place} {given}, but {there}")
    name = given or own or (wanted[0] if len(wanted) == 1 else None)
    if name is None:
        there = "which lies in no class folder" if table is None else f"which has none in {table}"
        raise UsageError(
            f"{where} gives no label for {record.place}, {there}: add a column label, or name "
            "the class of all by --class (classes=)"
        )
    if wanted and name not in wanted:
        raise UsageError(f"{where}: {record.place} is of the class {name}, not of {named(wanted)}")
    return known_class(name, classes)


def _is_known(label: str, classes: Sequence[str]) -> bool:
    return label in classes or (label.isdecimal() and int(label) < len(classes))


def _name(label: str, classes: Sequence[str]) -> str:
    """A class by its name, or by its number where no class has that name."""
    if label not in classes and _is_known(label, classes):
        return classes[int(label)]
    return classes[known_class(label, classes)]


def _row_in(record: Record, images: Images, where: str, records: Path) -> int:
    if isinstance(record.place, str):
        raise UsageError(f"{records} names the file {record.place}, but {where} has rows: give their numbers, from 0")
    if not 0 <= record.place < len(images):
        raise UsageError(f"{records} names row {record.place}, but {where} has the rows 0 to {len(images) - 1}")
    return record.place


def label_counts(labels: Sequence[int] | Tensor) -> dict[str, int]:
    """Examples by label, as a posterior's metadata keeps them."""
    return {str(label): n for label, n in sorted(Counter(torch.as_tensor(labels).tolist()).items())}
