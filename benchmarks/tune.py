"""Choose each method's settings for a small model, with the same number of trials for every method.

Trials run on another forgotten class and another seed than the bench reports, and are measured on a fifth of the
training data that they do not train on (``validation`` in the plan), never on the test set. Class scenarios: the
highest D_r among trials with D_f <= 5 % (else the lowest D_f); random: the smallest sum of the gaps to retraining in
D_r, D_f and MIA.

    python -m benchmarks.tune benchmarks/tuning/digits.toml runs/tune
    python -m benchmarks.tune benchmarks/tuning/fashion.toml runs/tune --data ROOT
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from distruction import experiments, methods, scenarios
from distruction.experiments import jobs, materials, runner
from distruction.experiments.grid import tomllib
from distruction.experiments.results import Cell, collect
from distruction.experiments.store import Store

VALIDATION = 0.2
"""Share of the training data that the settings are chosen on."""

GAPS = ("retain", "forget", "mia_entropy")


def score(cell: Cell, retrained: Cell) -> tuple[float, float]:
    """To be minimised."""
    numbers = cell.numbers
    if cell.scenario == "random":
        return sum(abs(numbers[m] - retrained.numbers[m]) for m in GAPS), 0.0
    return max(numbers["forget"], 5.0), -numbers["retain"]


def main(
    plan_file: Annotated[Path, typer.Argument(help="TOML: preset, target, seed and trials.")],
    out: Annotated[Path, typer.Argument(help="Folder of the trials; finished ones stay.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets.")] = None,
) -> None:
    """Run the trials and print the best settings as TOML."""
    plan = tomllib.loads(plan_file.read_text())
    base = experiments.preset(plan["preset"])
    found = [
        replace(s, targets=(plan["target"],) if s.name != "random" else s.targets)
        for s in base.scenarios
        if s.name in plan.get("scenarios", scenarios.NAMES)
    ]
    context = materials.Context(out, data)
    cells = {}
    for scenario in found:
        for method, options in {"retrain": {}, **plan["trials"], **plan.get(scenario.name, {})}.items():
            if scenario.name not in methods.get(method).scenarios:
                continue
            for values in itertools.product(*options.values()):
                settings = {**plan.get("fixed", {}).get(method, {}), **dict(zip(options, values, strict=True))}
                grid = replace(
                    base,
                    seeds=(plan["seed"],),
                    scenarios=(scenario,),
                    methods=(method,),
                    settings={method: settings},
                    sweep=None,
                    validation=plan.get("validation", VALIDATION),
                )
                for cell in jobs.cells(grid, context):
                    cells[cell.id] = cell
    outcome = runner.run(
        list(cells.values()), context, devices=["cpu"] * plan.get("workers", 2), threads=1, progress=True
    )
    for title, message in outcome.failures.values():
        print("failed:", title, message.splitlines()[-1])
    finished = collect(list(cells.values()), Store(context.store))
    for scenario in found:
        mine = [c for c in finished if c.scenario == scenario.name]
        retrained = next(c for c in mine if c.method == "retrain")
        for method in dict.fromkeys(c.method for c in mine):
            trials = sorted((c for c in mine if c.method == method), key=lambda c: score(c, retrained))
            print(f"\n[method.{method}.{scenario.name}]  # best of {len(trials)}")
            for c in trials:
                shown = {m: round(c.numbers[m], 1) for m in GAPS}
                print(f"# {dict(c.settings)} {shown} {c.numbers['seconds']:.1f} s")


if __name__ == "__main__":
    typer.run(main)
