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
from .files import write_atomically
from .loop import Step

with needed("cli"):
    from matplotlib.figure import Figure
    from rich.table import Table


@contextmanager
def folder(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and is deleted when it does not.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another folder or pass --overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield draft
        draft.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            path.replace(old / path.name)
            draft.replace(path)
            shutil.rmtree(old)
        else:
            draft.replace(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"

    def write(name: str) -> None:
        Path(name).write_text(text)

    write_atomically(path, write)


Value = float | tuple[float, float]


def table(title: str, rows: Mapping[str, Mapping[str, Value]], columns: Mapping[str, str]) -> Table:
    """One row per method, one column per metric: a number, or a mean and (s and the standard deviation).

    Args:
        title: above the table.
        rows: method to metric to value.
        columns: metric to its heading, in the order to show.
    """
    out = Table(title=title)
    out.add_column("method", no_wrap=True)
    for heading in columns.values():
        out.add_column(heading, justify="right")
    for name, metrics in rows.items():
        out.add_row(name, *(_number(metrics[key]) if key in metrics else "-" for key in columns))
    return out


def _number(value: Value) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.1f} (s {value[1]:.1f})"
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def plot_curves(path: Path, history: Sequence[Step]) -> None:
    """KL(q || p), and the accuracy of the sampled models on the forget set, against the step."""
    steps = [s.step for s in history]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [s.kl for s in history], color="tab:blue")
    left.set(xlabel="unlearning step", ylabel="KL(q || p) [nats]", title="distance from the posterior")
    right.plot(steps, [s.accuracy for s in history], color="tab:red")
    right.set(xlabel="unlearning step", ylabel="accuracy [%]", title="forget set, sampled weights", ylim=(-3, 103))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


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
