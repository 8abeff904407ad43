"""The jobs of a grid.

A job's facts determine its result, wherever and whenever it runs: they hold the data's hash, every setting and seed,
and the facts of what it is made from. Paths, devices and progress bars are in the `Context`.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .. import __version__, methods, scenarios
from .grid import Grid, Scenario
from .materials import Context, data_hash, fresh, make_split, pretrained_hash
from .store import key_of

FORMATS = {"model": 1, "posterior": 3}
"""Raised when a job's result changes for the same facts, so that no old entry is taken, nor what follows from one."""


@dataclass(frozen=True)
class Job:
    """One resumable unit.

    Attributes:
        kind: ``model``, ``retrained``, ``posterior``, ``shadow`` or ``cell``: also its folder in the store.
        facts: JSON-able; determine the result.
    """

    kind: str
    facts: Mapping[str, Any]

    @functools.cached_property
    def id(self) -> str:
        """Kind and key: equal for equal jobs."""
        return f"{self.kind}/{key_of(self.facts)}"

    @property
    def title(self) -> str:
        """For people."""
        facts = self.facts
        model = facts.get("model", facts)
        seed = model["seed"]
        parts = [self.kind, model["data"]["name"]]
        if "split" in facts:
            parts += [facts["split"]["scenario"], facts["split"]["target"]]
        if "method" in facts:
            parts.append(facts["method"])
        return " ".join([*filter(None, parts), f"seed {seed}"])

    def needs(self) -> Iterator["Job"]:
        """The jobs whose results this one reads."""
        for kind in ("model", "posterior", "retrained"):
            if isinstance(self.facts.get(kind), Mapping):
                yield Job(kind, self.facts[kind])
        for facts in self.facts.get("shadows", ()):
            yield Job("shadow", facts)


def cells(grid: Grid, context: Context, *, brief: bool = False) -> list[Job]:
    """The cells of a grid, those of its sweep included, each once.

    Args:
        grid: scenarios, methods and seeds.
        context: the data's folder.
        brief: measure D_r and D_f alone, as everywhere in a sweep.

    Raises:
        UsageError: a data set is missing, a class or the model is unknown, or the pretrained weights cannot be used.
    """
    found: dict[str, Job] = {}
    # So must the model be: a wrong name, or weights of another one, would fail in every job.
    some = _cell(grid, context, grid.scenarios[0], grid.scenarios[0].targets[0], grid.methods[0], {}, grid.seeds[0])
    fresh(some.facts["model"], replace(context, device="cpu"))
    for scenario in grid.scenarios:
        for target in scenario.targets:
            # The forget set must be known to exist before hours of training start.
            first = _cell(grid, context, scenario, target, grid.methods[0], {}, grid.seeds[0])
            make_split(first.facts["model"], first.facts["split"], context)
            for name in grid.methods:
                if scenario.name not in methods.get(name).scenarios:
                    continue
                for seed in grid.seeds:
                    settings = grid.settings_of(name, scenario.name)
                    cell = _cell(grid, context, scenario, target, name, settings, seed, brief=brief)
                    found[cell.id] = cell
    for cell in sweep_cells(grid, context):
        found.setdefault(cell.id, cell)
    return list(found.values())


def sweep_cells(grid: Grid, context: Context) -> list[Job]:
    """The cells of a grid's trade-off curves."""
    if grid.sweep is None:
        return []
    scenario = next(s for s in grid.scenarios if s.name == grid.sweep.scenario)
    return [
        _cell(
            grid,
            context,
            scenario,
            grid.sweep.target,
            name,
            {**grid.settings_of(name, scenario.name), methods.get(name).sweep: value},
            seed,
            brief=True,
        )
        for name, values in grid.sweep.values.items()
        for value in values
        for seed in grid.sweep.seeds
    ]


def _cell(
    grid: Grid,
    context: Context,
    scenario: Scenario,
    target: str,
    method: str,
    settings: Mapping[str, Any],
    seed: int,
    *,
    brief: bool = False,
) -> Job:
    groups = {k: list(v) for k, v in scenario.groups.items()}
    side = grid.network.get("img_size")
    model: dict[str, Any] = {
        "format": FORMATS["model"],
        "version": __version__,
        "data": {
            "name": scenario.data,
            "sha256": data_hash(scenario.data, context.data_root, side, context.skip_unreadable),
        },
        "groups": groups,
        "network": dict(grid.network),
        "pretrained": pretrained_hash(context.pretrained),
        "train": {**grid.train, **scenario.train},
        "seed": seed,
    }
    if grid.validation:
        model["data"]["validation"] = grid.validation
    split = {"scenario": scenario.name, "target": target, "count": scenario.count}
    facts: dict[str, Any] = {"model": model, "split": split, "method": method, "settings": dict(settings)}
    if revision := methods.get(method).revision:
        facts["revision"] = revision
    facts["retrained"] = {"model": model, "split": split}
    if methods.get(method).needs_posterior:
        facts["posterior"] = _posterior(grid, model, methods.get(method).preparation)
    facts["measure"] = {**grid.measure, "brief": brief}
    # The attacks look for a class that no other example has. Where nobody asks, the facts are as before there were any.
    if facts["measure"].pop("attacks") and scenario.name == "full-class" and not brief:
        facts["measure"]["attacks"] = True
    if not brief:
        # Shared by every seed of the grid.
        facts["shadows"] = [
            {**model, "seed": 10_000 + i, "pair": i // 2, "half": i % 2} for i in range(grid.measure["shadow_models"])
        ]
    return Job("cell", facts)


def _posterior(grid: Grid, model: Mapping[str, Any], preparation: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"format": FORMATS["posterior"], "model": model}
    if preparation in ("constant", "fisher"):
        return {**facts, "std": preparation, "posterior": _posterior(grid, model, "gauss-newton")}
    as_given = preparation == grid.prepare.get("method", "bgd")
    return {**facts, "prepare": dict(grid.prepare) if as_given or preparation == "bgd" else {"method": preparation}}


def forget_sets(jobs: list[Job], context: Context) -> Iterator[tuple[str, scenarios.Split, dict[str, Any]]]:
    """(file name, split, facts) for each distinct forget set of the cells."""
    seen: dict[str, Tensor] = {}
    for job in jobs:
        model, split = job.facts["model"], job.facts["split"]
        seed = f"-seed{model['seed']}" if split["scenario"] == "random" else f"-{split['target']}"
        name = f"{split['scenario']}{seed}.json".replace("/", "_").replace(" ", "_")
        if name in seen:
            continue
        made = make_split(model, split, context)
        seen[name] = made.indices
        yield name, made, {"data": model["data"]["name"], **split}
