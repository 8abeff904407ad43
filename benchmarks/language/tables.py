"""Tables and the figure of the runs."""

import statistics
from pathlib import Path
from typing import Any

COLUMNS = {
    "extracted": "extracted, %",
    "nll": "NLL, nats",
    "kept": "kept, %",
    "change": "perplexity, change in %",
    "recovered": "recovered, %",
    "exposure": "exposure, bits",
    "steps": "steps",
    "seconds": "seconds",
}


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: the mean over seeds and the seeds' values, and the answers kept at matched depth."""
    lines = []
    before = {(r["scenario"], r["seed"]): r["perplexity"] for r in runs if r["name"] == "before"}
    for scenario in dict.fromkeys(r["scenario"] for r in runs):
        own = [
            r | {"change": 100 * (r["perplexity"] / before[r["scenario"], r["seed"]] - 1)}
            for r in runs
            if r["scenario"] == scenario and "perplexity" in r
        ]
        lines += [f"**{scenario}**", "", f"| | {' | '.join(COLUMNS.values())} |", "|---|" + "---:|" * len(COLUMNS)]
        for name in dict.fromkeys(r["name"] for r in own):
            cells = [_cell([r[c] for r in own if r["name"] == name and c in r]) for c in COLUMNS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    deep = [r for r in runs if "at" in r]
    if deep:
        depths = list(deep[0]["at"])
        lines += [
            "**answers kept at matched depth, %: codes**",
            "",
            "| forgotten answers' NLL | " + " | ".join(depths) + " |",
            "|---|" + "---:|" * len(depths),
        ]
        for name in dict.fromkeys(r["name"] for r in deep):
            cells = [_cell([r["at"][d] for r in deep if r["name"] == name and r["at"][d] is not None]) for d in depths]
            lines.append(f"| {name.removeprefix('depth, ')} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    each = f" ({', '.join(f'{v:.1f}' for v in values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{each}"


def figure(runs: list[dict[str, Any]], path: Path) -> None:
    """Forgotten answers' likelihood against the answers kept, along each run of the comparison at matched depth."""
    import matplotlib.pyplot as plt

    deep = [r for r in runs if "looks" in r]
    objectives = list(dict.fromkeys(r["name"].partition(":")[0] for r in deep))
    fig, axes = plt.subplots(1, max(1, len(objectives)), figsize=(9, 3.6), sharey=True, squeeze=False)
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
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)
