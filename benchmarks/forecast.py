"""How good the forecast of a request's damage is, on requests that were not rehearsed.

    python -m benchmarks.forecast OUT

A ViT of 0.2 M parameters (`benchmarks.trained`) is trained on four fifths of the training set. On the last fifth a few
classes' requests are rehearsed (`distruction.rehearse` as it is). Then each other class, and each pair of neighbours
among them, is forgotten with each objective, and the forecast is compared with the points of D_r that the *test* set
lost, of which neither has seen anything. Where there are test images enough, as of Fashion-MNIST, the model is trained
on the whole training set, the rehearsals measure on one half of the test set, and the other half is compared with.
Writes ``forecast.json``, ``forecast.md`` and ``forecast.png``; models that are in the file are kept.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.trained import trained
from distruction import forget, prepare, rehearse
from distruction.data import forget_split, hold_out, load, loader
from distruction.experiments.materials import Context
from distruction.metrics import accuracy, predict
from distruction.rehearsal import OBJECTIVES
from distruction.report import write_json

MANY = 5000
"""Test images that are enough for two halves."""


def run(name: str, seed: int, pairs: bool, context: Context) -> dict[str, Any]:
    """One trained model: its rehearsals, and all the other requests."""
    fit, test = load(name, context.data_root)
    share = 0.0 if len(test) >= MANY else 0.2
    model = trained(name, seed, context, validation=share)
    if share:
        fit, held = hold_out(fit, share)
    else:
        test, held = hold_out(test, 0.5)
    batches = loader(fit, batch_size=64, shuffle=True)
    posterior = prepare(model, batches, seed=seed, progress=False)
    start = time.perf_counter()
    found = rehearse(model, posterior, batches, loader(held, batch_size=512), seed=seed, progress=False)
    seconds = time.perf_counter() - start
    rehearsed = {r.label for r in found}
    others = [i for i in range(len(fit.classes)) if i not in rehearsed]
    rows = []
    together = [list(pair) for pair in zip(others[::2], others[1::2], strict=False)] if pairs else []
    for labels in [[c] for c in others] + together:
        names = [fit.classes[i] for i in labels]
        gone, _ = forget_split(fit, names)
        _, retained = forget_split(test, names)
        for objective in OBJECTIVES:
            posterior.mean_(model)
            before = accuracy(*predict(model, loader(retained, batch_size=512)))
            report = forget(
                model,
                posterior,
                loader(gone, batch_size=64, shuffle=True),
                request="class",
                objective=objective,
                seed=seed,
                progress=False,
            )
            assert report.forecast is not None
            rows.append(
                {
                    "classes": names,
                    "objective": objective,
                    "damage": before - accuracy(*predict(model, loader(retained, batch_size=512))),
                    "forecast": report.forecast.damage,
                    "error": report.forecast.error,
                    "by": report.forecast.by,
                    "retained": len(retained),
                }
            )
    posterior.mean_(model)
    return {
        "data": name,
        "seed": seed,
        "rehearsals": posterior.metadata["rehearsals"],
        "seconds_of_rehearsal": seconds,
        "rows": rows,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: how far off the forecasts are, by data set, kind of request and objective."""
    lines = [
        "| data | request | objective | requests | damage in points, mean (largest) | error of the forecast, median "
        "(largest) | inside the bar % | half of the bar, mean |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for data in dict.fromkeys(r["data"] for r in runs):
        for count, kind in ((1, "one class"), (2, "two classes")):
            for objective in OBJECTIVES:
                rows = [
                    x
                    for r in runs
                    if r["data"] == data
                    for x in r["rows"]
                    if len(x["classes"]) == count and x["objective"] == objective
                ]
                if not rows:
                    continue
                damages = [x["damage"] for x in rows]
                errors = [abs(x["damage"] - x["forecast"]) for x in rows]
                inside = 100 * statistics.fmean(e <= x["error"] for e, x in zip(errors, rows, strict=True))
                bar = statistics.fmean(x["error"] for x in rows)
                lines.append(
                    f"| {data} | {kind} | {objective} | {len(rows)} | {statistics.fmean(damages):.2f} "
                    f"({max(damages):.2f}) | {statistics.median(errors):.2f} ({max(errors):.2f}) | {inside:.0f} "
                    f"| {bar:.2f} |"
                )
    return "\n".join(lines) + "\n"


def figure(runs: list[dict[str, Any]], path: Path) -> None:
    """Damage against forecast."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(4.2, 4))
    for data in dict.fromkeys(r["data"] for r in runs):
        rows = [x for r in runs if r["data"] == data for x in r["rows"]]
        ax.errorbar(
            [x["forecast"] for x in rows],
            [x["damage"] for x in rows],
            xerr=[x["error"] for x in rows],
            fmt="o",
            markersize=4,
            alpha=0.6,
            label=data,
        )
    ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
    ax.set(xlabel="forecast, points of D_r", ylabel="lost on the test set")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    dataset: Annotated[list[str], typer.Option(help="digits, fashion-mnist.")] = ["digits"],  # noqa: B006
    data: Annotated[Path | None, typer.Option(help="Root of the data sets but digits.")] = None,
    seed: Annotated[list[int], typer.Option()] = [0, 1, 2],  # noqa: B006
    pairs: Annotated[bool, typer.Option(help="Requests for two classes at once as well.")] = True,
    store: Annotated[Path | None, typer.Option(help="Keeps trained models, as that of the experiments.")] = None,
) -> None:
    """Run what is missing and write the tables."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "forecast.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    done = {(r["data"], r["seed"]) for r in runs}
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(store or Path(scratch), data)
        for name in dataset:
            for number in seed:
                if (name, number) not in done:
                    runs.append(run(name, number, pairs, context))
                    write_json(file, runs)
    (out / "forecast.md").write_text(table(runs))
    figure(runs, out / "forecast.png")
    print(table(runs))


if __name__ == "__main__":
    typer.run(main)
