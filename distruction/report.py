"""Report folders: tables, curves and example pictures, written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .data import Images
from .errors import UsageError
from .extras import needed
from .files import draft_folder, remove_leftovers, write_text
from .interrupts import held

with needed("cli"):
    from matplotlib.figure import Figure
    from rich.table import Table


@contextmanager
def folder(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and is deleted when it does not.

    A process that is killed while it puts the new folder in the place of an old one leaves that at worst under
    ``path`` with ``.replaced-`` and some letters behind it.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another folder or pass --overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    with held() as interrupts, draft_folder(path) as draft:
        with interrupts.let_through():
            yield draft
        draft.chmod(0o755)
        if not path.exists():
            draft.replace(path)
            return
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.replaced-"))
        old = path.replace(aside / path.name)
        try:
            draft.replace(path)
        except BaseException:
            # Where even this fails the old folder stays aside: it may be the only one there is.
            old.replace(path)
            aside.rmdir()
            raise
        shutil.rmtree(aside)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def table(title: str, rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str]) -> Table:
    """One row per model, one column per metric.

    Args:
        title: above the table.
        rows: model to metric to value.
        columns: metric to its heading, in the order to show.
    """
    texts = [[name, *(_number(row[key]) if key in row else "-" for key in columns)] for name, row in rows.items()]
    return lines(title, [["model", *columns.values()], *texts])


def lines(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts under its first row."""
    out = Table(title=title)
    for i, heading in enumerate(rows[0]):
        out.add_column(heading, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    for row in rows[1:]:
        out.add_row(*row)
    return out


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def examples(groups: Mapping[str, tuple[Images, Sequence[int], Sequence[int]]]) -> Figure:
    """A row of images for each group, titled with the predicted class, or before → after where unlearning changed it.

    Args:
        groups: row title to (images, predictions before, predictions after); as many images as predictions are drawn.
    """
    count = max(len(after) for _, _, after in groups.values())
    figure = Figure(figsize=(1.1 * count + 1, 1.75 * len(groups)), layout="constrained")
    for axes in (grid := figure.subplots(len(groups), count, squeeze=False)).flat:
        axes.set_axis_off()
    for row, (title, (images, before, after)) in zip(grid, groups.items(), strict=True):
        row[0].text(-0.25, 0.5, title, rotation=90, ha="center", va="center", transform=row[0].transAxes)
        for axes, image, b, a in zip(row, images.images, before, after, strict=False):
            pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
            axes.imshow(pixels, cmap="gray_r" if pixels.ndim == 2 else None, interpolation="nearest")
            text = f"{images.classes[b]} → {images.classes[a]}" if a != b else images.classes[b]
            axes.set_title(text, fontsize=9, color="tab:red" if a != b else "black")
    return figure
