"""Strength that is found, beside strength set by hand: what it costs that nobody has to choose lambda.

The experiments' three scenarios (`distruction bench`), from their Gauss-Newton posteriors: the target as it is, and the
same objective with each lambda and step size of a grid. The best of the grid is chosen *on what is reported*,
afterwards and for each model by itself: it keeps most D_r of those whose D_f is within `NEAR` points of the goal. It is
no method that anybody could use, but a bound of all that set lambda by hand. Goals: no image of the class, the level of
a sub-class, and for random records what retraining gives.

``python -m benchmarks.strength OUT --store STORE`` writes ``strength.json`` and ``strength.md``; a run that was stopped
goes on. Fashion-MNIST: ``--dataset fashion --data ROOT``.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from safetensors.torch import load_file
from torch import nn

from distruction import Posterior, forget
from distruction.data import loader
from distruction.experiments.grid import preset
from distruction.experiments.jobs import Job, cells
from distruction.experiments.materials import Context, fresh, make_split
from distruction.experiments.store import Store
from distruction.experiments.work import ensure
from distruction.metrics import accuracy, predict
from distruction.objectives import DEFAULT
from distruction.report import write_json
from distruction.scenarios import Split
from distruction.targets import SUB_CLASS

LAMBDAS = (0.003, 0.01, 0.03, 0.1, 0.3)
STEP_SIZES = (1.0, 0.3)
NEAR = 5.0
"""Points of D_f from the goal that count as reached."""


def run(cell: Job, context: Context) -> dict[str, Any]:
    """One scenario of one model."""
    facts = cell.facts
    jobs = {kind: Job(kind, facts[kind]) for kind in ("model", "retrained", "posterior")}
    for job in jobs.values():
        ensure(job, context)
    store = Store(context.store)
    folders = {kind: store.folder(kind, job.facts) for kind, job in jobs.items()}
    split = make_split(facts["model"], facts["split"], context)
    scenario, seed = facts["split"]["scenario"], facts["model"]["seed"]
    prior = Posterior.load(folders["posterior"] / "posterior.safetensors")

    def loaded(kind: str) -> nn.Module:
        model = fresh(facts["model"], context)
        model.load_state_dict(load_file(folders[kind] / "model.safetensors"))
        return model.eval()

    def forgotten(**asked: Any) -> dict[str, float]:
        model = loaded("model")
        batches = loader(split.forget, batch_size=64, shuffle=True)
        report = forget(model, prior, batches, objective=DEFAULT, seed=seed, progress=False, **asked)
        return {**measured(model, split), "steps": len(report.history)}

    retraining = measured(loaded("retrained"), split)
    goal = {"full-class": 0.0, "sub-class": 100 * SUB_CLASS}.get(scenario, retraining["D_f"])
    request: Literal["class", "records"] = "class" if scenario == "full-class" else "records"
    tried = {
        f"lambda {weight:g}, lr {lr:g}": forgotten(request=request, kl_weight=weight, lr=lr)
        for weight in LAMBDAS
        for lr in STEP_SIZES
    }
    return {
        "scenario": scenario,
        "seed": seed,
        "goal": goal,
        "before": measured(loaded("model"), split),
        "retraining": retraining,
        "found": forgotten(**facts["settings"]),
        "tried": tried,
        "best": best(tried, goal, below=scenario != "random"),
    }


def measured(model: nn.Module, split: Split) -> dict[str, float]:
    """D_r and D_f in percent."""
    parts = {"D_r": split.measured_retain, "D_f": split.measured_forget}
    return {name: accuracy(*predict(model, loader(part, batch_size=512))) for name, part in parts.items()}


def best(tried: dict[str, dict[str, float]], goal: float, *, below: bool) -> str | None:
    """The name of what keeps most D_r of those that reach the goal, or are ``below`` it; ``None`` where none is."""
    near = {n: x for n, x in tried.items() if -(100 if below else NEAR) <= x["D_f"] - goal <= NEAR}
    return max(near, key=lambda n: near[n]["D_r"]) if near else None


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, and the seeds' values."""
    lines = [
        "| data | scenario | goal of D_f | D_r before | found: D_r | D_f | best by hand: D_r | D_f | which "
        "| D_r found - by hand |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for data, scenario in dict.fromkeys((r["data"], r["scenario"]) for r in runs):
        mine = [r for r in runs if (r["data"], r["scenario"]) == (data, scenario)]
        hand = [r["tried"][r["best"]] for r in mine if r["best"] is not None]
        behind = [r["found"]["D_r"] - r["tried"][r["best"]]["D_r"] for r in mine if r["best"] is not None]
        cells = [
            _each(r["goal"] for r in mine),
            _each(r["before"]["D_r"] for r in mine),
            *(_each(r["found"][c] for r in mine) for c in ("D_r", "D_f")),
            *(_each(x[c] for x in hand) for c in ("D_r", "D_f")),
            "; ".join(r["best"] or "none" for r in mine),
            _each(behind, sign="+"),
        ]
        lines.append(f"| {data} | {scenario} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _each(values: Iterable[float], sign: str = "") -> str:
    found = list(values)
    if not found:
        return "-"
    return f"{statistics.fmean(found):{sign}.1f} ({', '.join(f'{v:{sign}.1f}' for v in found)})"


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    dataset: Annotated[str, typer.Option(help="digits or fashion.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Root of the data sets but digits.")] = None,
    seed: Annotated[list[int], typer.Option()] = [0, 1, 2],  # noqa: B006
    store: Annotated[Path | None, typer.Option(help="Of the experiments; default OUT/store.")] = None,
) -> None:
    """Run what is missing and write the table."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "strength.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    done = {(r["data"], r["scenario"], r["seed"]) for r in runs}
    grid = dataclasses.replace(preset(dataset), seeds=tuple(seed), methods=("distruction-auto",), sweep=None)
    context = Context(store or out / "store", data)
    for cell in cells(grid, context):
        scenario, number = cell.facts["split"]["scenario"], cell.facts["model"]["seed"]
        if (dataset, scenario, number) in done:
            continue
        runs.append({"data": dataset, **run(cell, context)})
        runs.sort(key=lambda r: (r["data"], ("full-class", "sub-class", "random").index(r["scenario"]), r["seed"]))
        write_json(file, runs)
        print(dataset, scenario, number, flush=True)
    (out / "strength.md").write_text(table(runs))
    print(table(runs))


if __name__ == "__main__":
    typer.run(main)
