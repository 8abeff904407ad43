"""The grid of an experiment: a TOML file, checked, and the jobs that it stands for."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from .. import methods, scenarios
from ..errors import UsageError
from ..extras import needed
from ..training import RECIPES

if sys.version_info >= (3, 11):
    import tomllib as tomllib
else:
    with needed("cli"):
        import tomli as tomllib

PRESETS = ("digits", "fashion", "cifar", "demo")

MEASURE: dict[str, Any] = {
    "batch_size": 512,
    "shadow_models": 0,
    "relearn_lr": 1e-3,
    "relearn_steps": 50,
    "attacks": False,
}
"""Options of the measurements and their defaults: batch size of the predictions; models of the likelihood-ratio attack,
an even number, as each half of the training set trains one and the other half the next; step size and most steps of
relearning; whether a class that is forgotten is attacked as `distruction.attacks.battery` does it."""


@dataclass(frozen=True)
class Scenario:
    """One scenario of a grid.

    Attributes:
        data: name of the data set.
        targets: classes to forget, one cell each; a single empty name in the random scenario.
        count: size of the random forget set.
        groups: super class to fine classes, for the sub-class scenario.
        train: settings of the training recipe that differ here.
    """

    name: str
    data: str
    targets: tuple[str, ...] = ("",)
    count: int = 0
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Trade-off curves: one scenario, one target, some seeds, and values of each method's main hyper-parameter."""

    scenario: str
    target: str
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Grid:
    """Scenarios x targets x methods x seeds, and how models are made and measured.

    ``network`` has the arguments of `models.create`; with ``plain_seed`` the untrained model is drawn from the seed
    itself, as ``distruction train --seed`` draws it, rather than from a stream of its own.
    ``validation`` is the share of the training data that is measured on in the place of the test set, which is then not
    used at all: for the choice of settings.
    """

    title: str
    seeds: tuple[int, ...]
    network: Mapping[str, Any]
    train: Mapping[str, Any]
    prepare: Mapping[str, Any]
    measure: Mapping[str, Any]
    scenarios: tuple[Scenario, ...]
    methods: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    sweep: Sweep | None
    validation: float = 0.0

    def settings_of(self, method: str, scenario: str) -> dict[str, Any]:
        """A method's settings in a scenario."""
        given = self.settings.get(method, {})
        common = {k: v for k, v in given.items() if k not in scenarios.NAMES}
        return {**common, **given.get(scenario, {})}


def preset(name: str) -> Grid:
    """A grid that comes with the library.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is unknown; choose {', '.join(PRESETS)}, or pass --grid FILE.toml")
    return parse((resources.files(__package__) / "presets" / f"{name}.toml").read_text(), name)


def read(path: str | Path) -> Grid:
    """The grid of a TOML file.

    Raises:
        UsageError: the file is missing or not a grid; says what is wrong.
    """
    if not Path(path).is_file():
        raise UsageError(f"no grid file at {path}; copy one of the presets ({', '.join(PRESETS)}) and change it")
    try:
        text = Path(path).read_text()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Grid:
    """A grid from TOML text.

    Raises:
        UsageError: not TOML, an unknown or missing name, or a value out of range; names ``where``.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}") from error
    _only(table, where, "title", "seeds", "network", "train", "prepare", "measure", "methods", "scenario", "method",
          "sweep")  # fmt: skip
    for name in ("seeds", "network", "scenario"):
        if not table.get(name):
            raise UsageError(f"{where} has no {name}")
    if not all(isinstance(seed, int) and seed >= 0 for seed in table["seeds"]):
        raise UsageError(f"{where}: seeds must be integers >= 0, not {table['seeds']}")
    settings = table.get("method", {})
    names = tuple(table.get("methods", [n for n, m in methods.REGISTRY.items() if not m.ablation]))
    if not names:
        raise UsageError(f"{where}: methods is empty; leave it out for all but the ablations")
    for name in {*names, *settings}:
        methods.get(name)
    for name, given in settings.items():
        methods.check(name, {k: v for k, v in given.items() if k not in scenarios.NAMES})
        for scenario in scenarios.NAMES:
            methods.check(name, given.get(scenario, {}))
    train = {"recipe": "adamw-onecycle", **table.get("train", {})}
    if train["recipe"] not in RECIPES:
        raise UsageError(f"{where}: recipe {train['recipe']!r} is unknown; choose {', '.join(RECIPES)}")
    measure = table.get("measure", {})
    _only(measure, f"{where}, [measure]", *MEASURE)
    if (count := measure.get("shadow_models", 0)) % 2:
        raise UsageError(f"{where}, [measure]: shadow_models must be even (they come in pairs), not {count}")
    found = tuple(_scenario(name, s, where) for name, s in table["scenario"].items())
    return Grid(
        title=table.get("title", where),
        seeds=tuple(table["seeds"]),
        network=table["network"],
        train=train,
        prepare=table.get("prepare", {}),
        measure={**MEASURE, **measure},
        scenarios=found,
        methods=names,
        settings=settings,
        sweep=_sweep(table["sweep"], found, where) if "sweep" in table else None,
    )


def _scenario(name: str, table: dict[str, Any], where: str) -> Scenario:
    where = f"{where}, [scenario.{name}]"
    if name not in scenarios.NAMES:
        raise UsageError(f"{where}: unknown scenario; choose {', '.join(scenarios.NAMES)}")
    _only(table, where, "data", "targets", "count", "groups", "train")
    if "data" not in table:
        raise UsageError(f"{where} has no data")
    if name == "random" and "count" not in table:
        raise UsageError(f"{where} has no count (size of the forget set)")
    if name != "random" and not table.get("targets"):
        raise UsageError(f"{where} has no targets (classes to forget)")
    groups = {k: tuple(v) for k, v in table.get("groups", {}).items()}
    targets = tuple(table.get("targets", ("",)))
    return Scenario(name, table["data"], targets, table.get("count", 0), groups, table.get("train", {}))


def _sweep(table: dict[str, Any], found: tuple[Scenario, ...], where: str) -> Sweep:
    where = f"{where}, [sweep]"
    _only(table, where, "scenario", "target", "seeds", "values")
    scenario = next((s for s in found if s.name == table.get("scenario")), None)
    if scenario is None:
        raise UsageError(f"{where}: scenario {table.get('scenario')!r} is not in the grid")
    values = {name: tuple(v) for name, v in table.get("values", {}).items()}
    for name in values:
        if not methods.get(name).sweep:
            raise UsageError(f"{where}: method {name} has no main hyper-parameter to sweep over")
    target = table.get("target", scenario.targets[0])
    return Sweep(scenario.name, target, tuple(table.get("seeds", (0,))), values)


def _only(table: Mapping[str, Any], where: str, *known: str) -> None:
    for name in table:
        if name not in known:
            raise UsageError(f"{where}: {name!r} is unknown; it may have {', '.join(known)}")
