"""Figures of a bench's report, as matplotlib figures."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..data import Images
from ..methods import REGISTRY
from ..scenarios import Split
from .results import Cell

_COLOURS = mpl.colormaps["tab20"]


def _colour(method: str) -> tuple[float, ...]:
    """A method and its twin with the KL penalty share a hue."""
    names = [m for m in REGISTRY if not m.endswith("+kl")]
    index = 2 * (names.index(method.removesuffix("+kl")) % 10)
    return _COLOURS(index + 1 if method.endswith("+kl") else index)


def kl_curves(cells: Sequence[Cell]) -> Figure | None:
    """KL(q || p) against the iteration, one curve per lambda (the paper's Figure 1), and the forget accuracy."""
    curves = {float(c.settings["kl_weight"]): c.value["history"] for c in cells if c.method == "distruction"}
    if not curves:
        return None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    for (weight, history), shade in zip(sorted(curves.items()), shades, strict=True):
        steps = range(1, len(history["kl"]) + 1)
        left.plot(steps, history["kl"], color=shade, label=f"λ = {weight:g}")
        right.plot(steps, history["accuracy"], color=shade)
    left.set(
        xlabel="unlearning iteration", ylabel="KL(q ‖ p) [nats]", title="distance from the posterior", yscale="log"
    )
    left.legend(fontsize=8)
    right.set(xlabel="unlearning iteration", ylabel="accuracy [%]", title="forget set, sampled weights", ylim=(-3, 103))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def trade_off(sweep: Sequence[Cell], single: Sequence[Cell]) -> Figure | None:
    """D_r against D_f, one curve per method over its main hyper-parameter.

    Args:
        sweep: cells of the curves.
        single: cells drawn as single marks (baseline, retrain) of the same task.
    """
    if not sweep:
        return None
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(c.method for c in sweep):
        key = REGISTRY[method].sweep
        groups: dict[float, list[Cell]] = {}
        for c in sweep:
            if c.method == method:
                groups.setdefault(float(c.settings[key]), []).append(c)
        points = [
            (np.mean([c.numbers["forget"] for c in g]), np.mean([c.numbers["retain"] for c in g]))
            for _, g in sorted(groups.items())
        ]
        style = "--" if method.endswith("+kl") else "-"
        width = 2.5 if method == "distruction" else 1.2
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, marker="o", markersize=4, lw=width, color=_colour(method), label=f"{method} ({key})")
    for method, mark in (("baseline", "s"), ("retrain", "*")):
        mine = [c for c in single if c.method == method]
        if mine:
            x, y = (np.mean([c.numbers[k] for c in mine]) for k in ("forget", "retain"))
            axes.plot(x, y, mark, color="black", markersize=10, label=method, linestyle="none")
    axes.set(xlabel="D_f accuracy [%]", ylabel="D_r accuracy [%]")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def confusion(cells: Sequence[Cell], classes: Sequence[str]) -> Figure:
    """What each method predicts on the measured forget set: a row per method, a column per class, in percent."""
    rows = {}
    for method in REGISTRY:
        counts = [c.value["confusion"] for c in cells if c.method == method]
        if counts:
            total = np.sum(counts, axis=0)
            rows[method] = 100 * total / total.sum()
    shown = list(range(len(classes)))
    if len(classes) > 20:
        largest = np.max(list(rows.values()), axis=0)
        shown = sorted(np.argsort(-largest)[:20].tolist())
    table = np.array(list(rows.values()))[:, shown]
    figure = Figure(figsize=(2 + 0.55 * len(shown), 1.1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(shown)), [classes[i] for i in shown], rotation=0 if len(shown) <= 10 else 60)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("predicted class")
    for (row, column), share in np.ndenumerate(table):
        if share >= 0.5:
            colour = "white" if share > 60 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def examples(split: Split, predictions: Mapping[str, Mapping[str, Sequence[int]]]) -> Figure:
    """A few images of the measured sets, with the class predicted before and after unlearning."""
    sets: dict[str, Images] = {"forget": split.measured_forget, "retain": split.measured_retain}
    count = max(len(p["after"]) for p in predictions.values())
    figure = Figure(figsize=(1.25 * count, 1.75 * len(sets)), layout="constrained")
    grid = figure.subplots(len(sets), count, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (name, data) in zip(grid, sets.items(), strict=True):
        for axes, image, b, a in zip(
            row, data.images, predictions[name]["before"], predictions[name]["after"], strict=False
        ):
            pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
            axes.imshow(pixels, cmap="gray_r" if pixels.ndim == 2 else None, interpolation="nearest")
            title = f"{data.classes[b]} → {data.classes[a]}" if a != b else data.classes[b]
            axes.set_title(title, fontsize=8, color="tab:red" if a != b else "black")
        row[0].text(-0.2, 0.5, name, rotation=90, ha="center", va="center", transform=row[0].transAxes)
    return figure
