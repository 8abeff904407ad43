"""Choose each method's settings for a small model, with the same number of trials for every method.

Trials run on another forgotten class and another seed than the bench reports, and are measured on a fifth of the
training data that they do not train on (``validation`` in the plan), never on the test set. Class scenarios: the
highest D_r among trials with D_f <= 5 % (else the lowest D_f); random: the smallest sum of the gaps to retraining in
D_r, D_f and MIA.

    python -m benchmarks.tune benchmarks/tuning/digits.toml runs/tune
    python -m benchmarks.tune benchmarks/tuning/fashion.toml runs/tune --data ROOT

All trials, best first, are written to ``trials.json`` in the folder.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from distruction import experiments, methods, scenarios
from distruction.experiments import jobs, materials, runner
from distruction.experiments.grid import Grid, Scenario, tomllib
from distruction.experiments.results import Cell, collect
from distruction.experiments.store import Store
from distruction.report import write_json

VALIDATION = 0.2
"""Share of the training data that the settings are chosen on."""

GAPS = ("retain", "forget", "mia_entropy")


def score(cell: Cell, retrained: Cell) -> tuple[float, float]:
    """To be minimised."""
    numbers = cell.numbers
    if cell.scenario == "random":
        return sum(abs(numbers[m] - retrained.numbers[m]) for m in GAPS), 0.0
    return max(numbers["forget"], 5.0), -numbers["retain"]


def trials(plan: Mapping[str, Any], base: Grid, scenario: Scenario, context: materials.Context) -> Iterator[jobs.Job]:
    """The cells of a scenario: retraining, and every method with every one of its settings."""
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
            # Of a class nothing but D_r and D_f is asked.
            yield from jobs.cells(grid, context, brief=scenario.name != "random")


def main(
    plan_file: Annotated[Path, typer.Argument(help="TOML: preset, scenarios, target (one, or of each), seed, trials.")],
    out: Annotated[Path, typer.Argument(help="Folder of the trials; finished ones stay.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets.")] = None,
) -> None:
    """Run the trials and write and print them, best first."""
    plan = tomllib.loads(plan_file.read_text())
    base = experiments.preset(plan["preset"])
    context = materials.Context(out, data)
    cells: dict[str, jobs.Job] = {}
    for scenario in base.scenarios:
        if scenario.name in plan.get("scenarios", scenarios.NAMES):
            target = plan["target"] if isinstance(plan["target"], str) else plan["target"].get(scenario.name)
            own = scenario if scenario.name == "random" else replace(scenario, targets=(target,))
            cells |= {cell.id: cell for cell in trials(plan, base, own, context)}
    outcome = runner.run(
        list(cells.values()), context, devices=["cpu"] * plan.get("workers", 2), threads=1, progress=True
    )
    for title, message in outcome.failures.values():
        print("failed:", title, message.splitlines()[-1])
    finished = collect(list(cells.values()), Store(context.store))
    found = []
    for name in dict.fromkeys(c.scenario for c in finished):
        mine = [c for c in finished if c.scenario == name]
        retrained = next(c for c in mine if c.method == "retrain")
        for method in dict.fromkeys(c.method for c in mine):
            ranked = sorted((c for c in mine if c.method == method), key=lambda c: score(c, retrained))
            print(f"\n[method.{method}.{name}]  # best of {len(ranked)}")
            for c in ranked:
                shown = {m: c.numbers[m] for m in GAPS if m in c.numbers}
                rounded = {m: round(value, 1) for m, value in shown.items()}
                print(f"# {dict(c.settings)} {rounded}")
                found.append({"scenario": name, "method": method, "settings": dict(c.settings), **shown})
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "trials.json", found)


if __name__ == "__main__":
    typer.run(main)
