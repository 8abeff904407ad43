"""Tables and the figure of the runs."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...extras import needed
from ...files import write_atomically

with needed("experiments"):
    from matplotlib.figure import Figure

COLUMNS = {
    "extracted": "extracted, %",
    "nll": "NLL, nats",
    "kept": "kept, %",
    "change": "perplexity, change in %",
    "recovered": "recovered, %",
    "exposure": "exposure, bits",
    "steps": "steps",
}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds with the smallest and the largest, and the answers kept at matched depth."""
    lines = []
    before = {(r["scenario"], r["seed"]): r["perplexity"] for r in runs if r["name"] == "before"}
    for scenario in dict.fromkeys(r["scenario"] for r in runs):
        own = [_with_change(r, before) for r in runs if r["scenario"] == scenario and "perplexity" in r]
        seeds = sorted({r["seed"] for r in own})
        lines += [f"**{scenario}, {_named(seeds)}**", "", *_head("", COLUMNS.values())]
        for name in dict.fromkeys(r["name"] for r in own):
            cells = [_cell([r[c] for r in own if r["name"] == name and c in r], len(seeds)) for c in COLUMNS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    deep = [r for r in runs if "at" in r]
    if deep:
        lines += _at_depth(deep)
    return "\n".join(lines)


def _with_change(run: dict[str, Any], before: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    own = before.get((run["scenario"], run["seed"]))  # not there yet, while workers are busy
    return run if own is None else run | {"change": 100 * (run["perplexity"] / own - 1)}


def _named(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _head(first: str, columns: Iterable[str]) -> list[str]:
    columns = list(columns)
    return [f"| {first} | {' | '.join(columns)} |".replace("|  |", "| |"), "|---|" + "---:|" * len(columns)]


def _at_depth(deep: list[dict[str, Any]]) -> list[str]:
    """Answers kept where forgetting is as deep, and by how many points the learned std is ahead on the same seed."""
    depths, seeds = list(deep[0]["at"]), sorted({r["seed"] for r in deep})
    kept = {(r["name"].removeprefix("depth, "), r["seed"]): r["at"] for r in deep}
    names = list(dict.fromkeys(name for name, _ in kept))
    lines = [f"**answers kept at matched depth, %: codes, {_named(seeds)}**", "", *_head("NLL, nats", depths)]
    for name in names:
        cells = [_cell([kept[name, s].get(d) for s in seeds if (name, s) in kept], len(seeds)) for d in depths]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "**points more kept with the learned std**", "", *_head("NLL, nats", depths)]
    for name in names:
        objective, _, other = name.partition(": ")
        learned = f"{objective}: learned std"
        pairs = [(kept[learned, s], kept[name, s]) for s in seeds if {(learned, s), (name, s)} <= set(kept)]
        ahead = [[None if None in (a[d], b[d]) else a[d] - b[d] for a, b in pairs] for d in depths]
        if name != learned:
            lines.append(f"| {objective}: than {other} | {' | '.join(_cell(v, len(seeds)) for v in ahead)} |")
    return [*lines, ""]


def _cell(values: Sequence[float | None], seeds: int) -> str:
    """Mean, smallest and largest, and of how many seeds where some have none."""
    found = [v for v in values if v is not None]
    if not found:
        return "-"
    shown = f"{statistics.fmean(found):.1f}"
    if len(found) > 1:
        shown += f" ({min(found):.1f} to {max(found):.1f})"
    return shown if len(found) == seeds else f"{shown} [{len(found)} of {seeds}]"


BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def on_page(page: str, runs: list[dict[str, Any]]) -> str:
    """A page with its tables made anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(runs)}\n{END}{rest.partition(END)[2]}"


def figure(runs: list[dict[str, Any]], path: Path) -> None:
    """Forgotten answers' likelihood against the answers kept, along each run of the comparison at matched depth."""
    deep = [r for r in runs if "looks" in r]
    objectives = list(dict.fromkeys(r["name"].partition(":")[0] for r in deep))
    fig = Figure(figsize=(9, 3.6), layout="tight")
    axes = fig.subplots(1, max(1, len(objectives)), sharey=True, squeeze=False)
    for ax, objective in zip(axes.flat, objectives, strict=False):
        own = [r for r in deep if r["name"].startswith(f"{objective}:")]
        names = list(dict.fromkeys(r["name"] for r in own))
        for r in own:
            first = r is next(x for x in own if x["name"] == r["name"])
            label = r["name"].partition(": ")[2] if first else None
            style = {"color": f"C{names.index(r['name'])}", "label": label, "markersize": 3}
            ax.plot([x["nll"] for x in r["looks"]], [x["kept"] for x in r["looks"]], ".-", **style)
        ax.set(title=objective.removeprefix("depth, "), xlabel="NLL of the forgotten codes, nats per token")
        ax.set(ylim=(0, 102), xlim=(0, 9))
        ax.grid(alpha=0.3)
        ax.legend()
    axes[0, 0].set_ylabel("other answers kept, %")
    write_atomically(path, lambda name: fig.savefig(name, dpi=130))
