"""Figures of a bench's report, as matplotlib figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..extras import needed
from ..methods import REGISTRY
from ..report import examples
from ..scenarios import Split
from .results import Cell
from .tables import title

with needed("experiments"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

_COLOURS = mpl.colormaps["tab20"]


def _colour(method: str) -> tuple[float, ...]:
    """A method and its twin with the KL penalty share a hue."""
    names = [m for m in REGISTRY if not m.endswith("+kl")]
    index = 2 * (names.index(method.removesuffix("+kl")) % 10)
    return _COLOURS(index + 1 if method.endswith("+kl") else index)


def kl_curves(cells: Sequence[Cell]) -> Figure | None:
    """KL(q || p) against the iteration, one curve per lambda (the paper's Figure 1), and the forget accuracy."""
    found = {float(c.settings["kl_weight"]): c.value["history"] for c in cells if c.method == "distruction"}
    return curves({f"λ = {weight:g}": history for weight, history in sorted(found.items())}) if found else None


def curves(histories: Mapping[str, Mapping[str, Any]]) -> Figure:
    """KL(q || p), and the accuracy of the sampled models on the forget set, against the iteration: a curve for each."""
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(histories)))
    for (label, history), shade in zip(histories.items(), shades, strict=True):
        steps = range(1, len(history["kl"]) + 1)
        left.plot(steps, history["kl"], color=shade, label=label)
        right.plot(steps, history["accuracy"], color=shade)
    left.set(
        xlabel="unlearning iteration", ylabel="KL(q ‖ p) [nats]", title="distance from the posterior", yscale="log"
    )
    right.set(xlabel="unlearning iteration", ylabel="accuracy [%]", title="forget set, sampled weights", ylim=(-3, 103))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if len(histories) > 1:
        figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure


def predictions(cell: Cell, split: Split) -> Figure:
    """The first images of both measured sets, with what the model called them before and after unlearning."""
    parts, called = {"forget": split.measured_forget, "retain": split.measured_retain}, cell.value["examples"]
    return examples({n: (part, called[n]["before"], called[n]["after"]) for n, part in parts.items()})


def trade_off(sweep: Sequence[Cell], single: Sequence[Cell]) -> Figure | None:
    """D_r against D_f, a curve per method over its main hyper-parameter: all of it, and where little is left to forget.

    Args:
        sweep: cells of the curves.
        single: cells drawn as single marks (baseline, retrain) of the same task.
    """
    if not sweep:
        return None
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    whole, near = figure.subplots(1, 2)
    for method in dict.fromkeys(c.method for c in sweep):
        key = REGISTRY[method].sweep
        groups: dict[float, list[Cell]] = {}
        for c in sweep:
            if c.method == method:
                groups.setdefault(float(c.settings[key]), []).append(c)
        x, y = zip(*(_mean_point(g) for _, g in sorted(groups.items())), strict=True)
        style = "--" if method.endswith("+kl") else "-"
        width = 2.5 if method == "distruction" else 1.2
        label = f"{title(method)} ({'λ' if key == 'kl_weight' else key})"
        for axes in (whole, near):
            axes.plot(x, y, style, marker="o", markersize=4, lw=width, color=_colour(method), label=label)
        if method == "distruction":
            for value, point in zip(sorted(groups), zip(x, y, strict=True), strict=True):
                near.annotate(
                    f"{value:g}", point, xytext=(5, 3), textcoords="offset points", fontsize=8, annotation_clip=True
                )
    for method, mark in (("baseline", "s"), ("retrain", "*")):
        mine = [c for c in single if c.method == method]
        if mine:
            x_at, y_at = _mean_point(mine)
            for axes in (whole, near):
                axes.plot(x_at, y_at, mark, color="black", markersize=10, label=method, linestyle="none")
    top = max(c.numbers["retain"] for c in [*sweep, *single])
    near.set(xlim=(-0.75, 20), ylim=(top - 15, top + 0.75), title="where little is left")
    whole.set(title="all")
    for axes in (whole, near):
        axes.set(xlabel="$D_f$ [%]", ylabel="$D_r$ [%]")
        axes.grid(alpha=0.3)
    figure.legend(*whole.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure


def _mean_point(cells: Sequence[Cell]) -> tuple[float, float]:
    """Mean (D_f, D_r)."""
    return float(np.mean([c.numbers["forget"] for c in cells])), float(np.mean([c.numbers["retain"] for c in cells]))


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
    axes.set_yticks(range(len(rows)), [title(m) for m in rows])
    axes.set_xlabel("predicted class")
    for (row, column), share in np.ndenumerate(table):
        if share >= 0.5:
            colour = "white" if share > 60 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return figure
