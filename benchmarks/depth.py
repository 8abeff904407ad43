"""Removed or hidden: forgetting with and without depth beside retraining, under every attack.

A ViT of 0.2 M parameters is trained (`benchmarks.trained`) and its posterior prepared by the defaults; each class is
forgotten by the defaults and with ``depth="features"``, and a model is retrained without it. Nothing is tuned by class,
seed or data set: the settings of `distruction.depth` were chosen on digits with seeds that are not among those here.
The attacker has all training images of digits, and 6000 of Fashion-MNIST; the test images measure.

``python -m benchmarks.depth OUT`` writes ``depth.json``, ``depth.md`` and ``depth.png``; a run that was stopped goes on
with what is missing (of a class as well), and ``--store`` keeps what was trained.
"""

import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.trained import trained
from distruction import attacks, forget, prepare
from distruction.data import Images, forget_split, load, loader
from distruction.experiments.materials import Context
from distruction.metrics import accuracy, predict
from distruction.report import write_json

SHOWN = ("forget", "prototype_5", "prototype_50", "few_shot_20", "few_shot_100", "relearn_100", "linear_probe")
"""What the figure has, against D_r."""
DRAWS = 2
ATTACKER = 6000
"""Training images, at most, that the attacker has."""
HOW = ("before", "retraining", "default", "depth")


def run(
    data: tuple[Images, Images],
    found: dict[str, Any],
    base: torch.nn.Module,
    posterior: Any,
    retrain: Callable[[], torch.nn.Module],
    **asked: Any,
) -> None:
    """One class: what is missing of the attacks on the model before, a retrained one, and both ways to forget."""
    train_data, test_data = data
    seed, label = found["seed"], found["class"]
    gone, _ = forget_split(train_data, label)
    known = train_data
    if len(known) > ATTACKER:
        known = known.subset(torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))[:ATTACKER])
    parts = forget_split(known, label), forget_split(test_data, label)
    for how in (h for h in HOW if h not in found):
        if how == "before":
            found[how] = before(base, parts, seed)
            continue
        model = retrain() if how == "retraining" else copy.deepcopy(base)
        facts = {}
        if how in ("default", "depth"):
            batches = loader(gone, batch_size=64, shuffle=True)
            depth: Literal["features"] | None = "features" if how == "depth" else None
            report = forget(
                model,
                posterior,
                batches,
                request="class",
                depth=depth,
                seed=seed,
                progress=False,
                **(asked if how == "depth" else {}),
            )
            facts = {
                "reached": report.reached,
                "steps": len(report.history),
                "kl": report.kl,
                "seconds": report.seconds,
                "cosine": report.cosine,
            }
        found[how] = facts | attacks.battery(
            model, *parts, original=None if how == "retraining" else base, draws=DRAWS, seed=seed
        )


def before(model: torch.nn.Module, parts: Any, seed: int) -> dict[str, float]:
    """Accuracies and prototypes of the model that has forgotten nothing, in which tuning has nothing to do."""
    (gone, kept), (probe, others) = parts
    found = {
        "retain": accuracy(*predict(model, loader(others, batch_size=512))),
        "forget": accuracy(*predict(model, loader(probe, batch_size=512))),
    }
    for shots in (5, 50):
        found[f"prototype_{shots}"] = attacks.prototype(model, gone, kept, probe, shots=shots, draws=DRAWS, seed=seed)
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: for each data set means over classes and seeds, and the classes one by one."""
    names = [c for c in attacks.COLUMNS if c in runs[0]["default"]]
    lines = [
        "| data | | " + " | ".join(attacks.COLUMNS[c] for c in names) + " | steps | seconds | not reached |",
        "|---|---|" + "---:|" * (len(names) + 3),
    ]
    for data, mine in by_data(runs).items():
        for how in HOW:
            rows = [r[how] for r in mine]
            cells = [f"{statistics.fmean(r[c] for r in rows):.1f}" if c in rows[0] else "-" for c in names]
            if "steps" in rows[0]:
                cells += [f"{statistics.fmean(r[c] for r in rows):.1f}" for c in ("steps", "seconds")]
                cells.append(str(sum(not r["reached"] for r in rows)))
            else:
                cells += ["-"] * 3
            lines.append(f"| {data} | {how} | {' | '.join(cells)} |")
    lines += [
        "",
        "| data | seed | class | D_r before | retraining | default | depth | prototype, 5: retraining | default "
        "| depth | prototype, 50: retraining | default | depth |",
        "|---|---:|---|" + "---:|" * 10,
    ]
    for r in runs:
        cells = [f"{r['before']['retain']:.1f}"]
        for column in ("retain", "prototype_5", "prototype_50"):
            cells += [f"{r[how][column]:.1f}" for how in HOW[1:]]
        lines.append(f"| {r['data']} | {r['seed']} | {r['class']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(runs: list[dict[str, Any]], data: str) -> str:
    """Markdown: the means of one data set, as the page has them."""
    pairs = (("prototype_5", "prototype_50"), ("few_shot_20", "few_shot_100"))
    lines = [
        "| | D_r | prototype, 5 / 50 | few shots, 20 / 100 steps | relearning | linear probe |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for how in HOW:
        rows = [r[how] for r in by_data(runs)[data]]
        cells = [
            " / ".join(f"{statistics.fmean(r[c] for r in rows):.1f}" for c in columns if c in rows[0])
            for columns in (("retain",), *pairs, ("relearn_100",), ("linear_probe",))
        ]
        lines.append(f"| {how} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def by_data(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each data set."""
    return {data: [r for r in runs if r["data"] == data] for data in dict.fromkeys(r["data"] for r in runs)}


def figure(runs: list[dict[str, Any]], path: Path) -> None:
    """D_r against what each attack finds, a row for each data set, a point for each class and seed."""
    import matplotlib.pyplot as plt

    parts = by_data(runs)
    size = (2.1 * len(SHOWN), 2.4 * len(parts) + 0.5)
    fig, axes = plt.subplots(len(parts), len(SHOWN), figsize=size, sharey="row", squeeze=False)
    for (data, mine), row in zip(parts.items(), axes, strict=True):
        for ax, attack in zip(row, SHOWN, strict=True):
            for how, marker in zip(HOW, "xso^", strict=True):
                rows = [r[how] for r in mine if attack in r[how]]
                ax.plot([x[attack] for x in rows], [x["retain"] for x in rows], marker, label=how, alpha=0.7)
            ax.set(title=attacks.COLUMNS[attack], xlabel="found, %", xlim=(-5, 105))
            ax.grid(alpha=0.3)
        row[0].set_ylabel(f"{data}: D_r, %")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(HOW))
    fig.tight_layout(rect=(0, 0, 1, 1 - 0.4 / size[1]))
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    dataset: Annotated[str, typer.Option(help="digits or fashion-mnist.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Root of the data sets but digits.")] = None,
    seed: Annotated[list[int], typer.Option()] = [1],  # noqa: B006
    label: Annotated[list[str] | None, typer.Option("--class", help="All, where none is given.")] = None,
    store: Annotated[Path | None, typer.Option(help="Keeps trained models, as that of the experiments.")] = None,
    cosine_level: Annotated[float | None, typer.Option(help="Of depth, in place of its default.")] = None,
    objective: Annotated[str | None, typer.Option(help="Of depth, in place of its default.")] = None,
) -> None:
    """Run what is missing and write the tables."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "depth.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    known = {(r["data"], r["seed"], r["class"]): r for r in runs}
    both = load(dataset, data)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(store or Path(scratch), data)
        for s in seed:
            missing = {}
            for c in label or both[0].classes:
                found = known.get((dataset, s, c), {"data": dataset, "seed": s, "class": c})
                if not found.keys() >= set(HOW):
                    missing[c] = found
            if not missing:
                continue
            base = trained(dataset, s, context)
            posterior = prepare(base, loader(both[0], batch_size=64, shuffle=True), seed=s, progress=False)
            for c, found in missing.items():
                retrain = partial(trained, dataset, s, context, without=c)
                run(both, found, base, posterior, retrain, cosine_level=cosine_level, objective=objective)
                if found not in runs:
                    runs.append(found)
                runs.sort(key=lambda r: (r["data"], r["seed"], r["class"]))
                write_json(file, runs)
                print(dataset, s, c, flush=True)
    (out / "depth.md").write_text(table(runs))
    figure(runs, out / "depth.png")
    print(table(runs))


if __name__ == "__main__":
    typer.run(main)
