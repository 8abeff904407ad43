"""The curves of a request's report, drawn in the page's own colours."""

from collections.abc import Iterator, Mapping
from typing import Any

from .extras import needed
from .pages import ACCENT, INK

with needed("experiments", "a report"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

CURVES = {
    "loss": ("loss of the objective", False),
    "probability": ("mean probability of what is forgotten", True),
    "kl": ("KL(q ‖ p), nats", False),
    "kl_weight": ("λ, weight of the KL", True),
}
"""Of a step: the title, and whether the axis is logarithmic."""


def curves(report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """A figure for each quantity that changed over the steps."""
    for key, (title, logarithmic) in CURVES.items():
        points = [(s["step"], s[key]) for s in report["steps"] if s[key] is not None]
        if not points:
            continue
        figure = Figure(figsize=(4, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), color=ACCENT, linewidth=1.6)
        # An advantage is no probability.
        if key == "probability" and report["level"] is not None and report["advantage"] is None:
            axes.axhline(report["level"], color=INK, linewidth=0.9, linestyle="--")
            axes.annotate(
                f"level {report['level']:g}", (points[-1][0], report["level"]), (0, 3),
                textcoords="offset points", ha="right", color=INK, fontsize=9,
            )  # fmt: skip
        values = [value for _, value in points]
        if logarithmic and min(values) > 0:
            axes.set_yscale("log")
            if max(values) > 30 * min(values):
                axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, color=INK, fontsize=11)
        axes.set_xlabel("step", color=INK)
        axes.tick_params(which="both", colors=INK, labelsize=9)
        axes.grid(alpha=0.2, color=INK)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(INK)
        yield title, figure
