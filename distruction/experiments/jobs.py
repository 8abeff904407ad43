"""The jobs of a grid, and what a worker process does for each.

A job's facts determine its result, wherever and whenever it runs: they hold the data's hash, every setting and seed,
and the facts of what it is made from. Paths, devices and progress bars are in the `Context`.
"""

import copy
import functools
import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import __version__, methods, models, scenarios
from ..data import Images, grouped, hold_out, load, loader
from ..errors import UsageError
from ..forgetting import ForgetReport
from ..methods import Counted, Task
from ..metrics import predict
from ..posterior import Posterior
from ..preparation import prepare
from ..seeds import seed_of
from ..training import RECIPES
from . import measure
from .grid import Grid, Scenario
from .memory import Peak
from .store import Store, canonical, file_hash, key_of

FORMATS = {"model": 1, "posterior": 3}
"""Raised when a job's result changes for the same facts, so that no old entry is taken, nor what follows from one."""


@dataclass(frozen=True)
class Context:
    """Where and on what jobs run; nothing here changes a result.

    Attributes:
        store: folder of the results.
        data_root: folder of the data sets, or ``None`` for those that need none.
        pretrained: file of pretrained weights, ``hub`` for the hub's cache, or ``None``.
        device: as torch names it.
        backend: see `distruction.ops`.
        skip_unreadable: leave out image files that cannot be read; what is left is part of a job's facts.
    """

    store: Path
    data_root: Path | None = None
    pretrained: str | None = None
    device: str = "cpu"
    backend: str = "auto"
    skip_unreadable: bool = False


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


def cells(grid: Grid, context: Context) -> list[Job]:
    """The cells of a grid, those of its sweep included, each once.

    Raises:
        UsageError: a data set is missing, a class or the model is unknown, or the pretrained weights cannot be used.
    """
    found: dict[str, Job] = {}
    # So must the model be: a wrong name, or weights of another one, would fail in every job.
    some = _cell(grid, context, grid.scenarios[0], grid.scenarios[0].targets[0], grid.methods[0], {}, grid.seeds[0])
    _fresh(some.facts["model"], replace(context, device="cpu"))
    for scenario in grid.scenarios:
        for target in scenario.targets:
            # The forget set must be known to exist before hours of training start.
            first = _cell(grid, context, scenario, target, grid.methods[0], {}, grid.seeds[0])
            make_split(first.facts["model"], first.facts["split"], context)
            for name in grid.methods:
                if scenario.name not in methods.get(name).scenarios:
                    continue
                for seed in grid.seeds:
                    cell = _cell(grid, context, scenario, target, name, grid.settings_of(name, scenario.name), seed)
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
            "sha256": _data_hash(scenario.data, context.data_root, side, context.skip_unreadable),
        },
        "groups": groups,
        "network": dict(grid.network),
        "pretrained": _pretrained_hash(context.pretrained),
        "train": {**grid.train, **scenario.train},
        "seed": seed,
    }
    if grid.validation:
        model["data"]["validation"] = grid.validation
    split = {"scenario": scenario.name, "target": target, "count": scenario.count}
    facts: dict[str, Any] = {"model": model, "split": split, "method": method, "settings": dict(settings)}
    facts["retrained"] = {"model": model, "split": split}
    if methods.get(method).needs_posterior:
        published = methods.get(method).preparation == "bgd"
        settings_of_prepare = dict(grid.prepare) if published else {"method": "gauss-newton"}
        facts["posterior"] = {"format": FORMATS["posterior"], "model": model, "prepare": settings_of_prepare}
    facts["measure"] = {**grid.measure, "brief": brief}
    if not brief:
        # Shared by every seed of the grid.
        facts["shadows"] = [
            {**model, "seed": 10_000 + i, "pair": i // 2, "half": i % 2} for i in range(grid.measure["shadow_models"])
        ]
    return Job("cell", facts)


@functools.cache
def _data(name: str, root: Path | None, side: int | None, skip_unreadable: bool) -> tuple[Images, Images]:
    return load(name, root, side=side, skip_unreadable=skip_unreadable)


@functools.cache
def _data_hash(name: str, root: Path | None, side: int | None, skip_unreadable: bool) -> str:
    digest = hashlib.sha256()
    for part in _data(name, root, side, skip_unreadable):
        digest.update(canonical([list(part.images.shape), part.classes]).encode())
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.contiguous().numpy().data)
        if part.fine is not None:
            digest.update(canonical(part.fine_classes).encode())
            digest.update(part.fine.contiguous().numpy().data)
    return digest.hexdigest()


@functools.cache
def _pretrained_hash(pretrained: str | None) -> str | None:
    if pretrained is None or pretrained == "hub":
        return pretrained
    if not Path(pretrained).is_file():
        raise UsageError(f"no pretrained weights at {pretrained}; pass a file, or hub for the hub's cache")
    return file_hash(pretrained)


def make_split(model: Mapping[str, Any], split: Mapping[str, Any], context: Context) -> scenarios.Split:
    """The scenario of these facts."""
    train, test = _training_data(model, context)
    if split["scenario"] == "random":
        return scenarios.random(train, test, split["count"], model["seed"])
    if split["scenario"] == "sub-class":
        return scenarios.sub_class(train, test, split["target"])
    return scenarios.full_class(train, test, split["target"])


def execute(job: Job, context: Context) -> float:
    """Do a job and write its entry; returns the seconds that it took."""
    start = time.perf_counter()
    _WORK[job.kind](job.facts, context)
    return time.perf_counter() - start


def _fresh(facts: Mapping[str, Any], context: Context) -> nn.Module:
    train, _ = _training_data(facts, context)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(facts["seed"], 3))
        side = train.images.shape[-1]
        network = {"img_size": side, **facts["network"]}
        model = models.create(
            **network,
            num_classes=len(train.classes),
            in_chans=train.images.shape[1],
            pretrained=context.pretrained,
        )
        if network["img_size"] != side:
            models.resize_inputs(model, network["img_size"])
    return model.to(context.device)


def _training_data(facts: Mapping[str, Any], context: Context) -> tuple[Images, Images]:
    """Labelled as the model's head is, on its device."""
    side = facts["network"].get("img_size")
    parts = _data(facts["data"]["name"], context.data_root, side, context.skip_unreadable)
    if share := facts["data"].get("validation"):
        parts = hold_out(parts[0], share)
    if facts["groups"]:
        parts = grouped(parts[0], facts["groups"]), grouped(parts[1], facts["groups"])
    return parts[0].to(context.device), parts[1].to(context.device)


def _recipe(facts: Mapping[str, Any], model: nn.Module, data: Dataset) -> None:
    settings = dict(facts["train"])
    RECIPES[settings.pop("recipe")](model, data, seed=facts["seed"], progress=False, **settings)


def _train(facts: Mapping[str, Any], context: Context) -> None:
    train, _ = _training_data(facts, context)
    model = _fresh(facts, context)
    start = time.perf_counter()
    _recipe(facts, model, train)
    _save_model("model", facts, context, model, {"seconds": time.perf_counter() - start})


def _save_model(
    kind: str, facts: Mapping[str, Any], context: Context, model: nn.Module, value: Mapping[str, Any]
) -> None:
    state = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
    files = {"model.safetensors": lambda path: save_file(state, path)}
    Store(context.store).save(kind, facts, value, files)


def _load_model(kind: str, facts: Mapping[str, Any], context: Context) -> nn.Module:
    """The model of a ``model`` or ``retrained`` entry, whose presence the runner has checked."""
    model = _fresh(facts.get("model", facts), context)
    model.load_state_dict(load_file(Store(context.store).folder(kind, facts) / "model.safetensors"))
    return model.eval()


def _shadow(facts: Mapping[str, Any], context: Context) -> None:
    """Train on one of the two halves of a random partition; keep the logits of everything, for attacks that need them.

    The pair's other model is trained on the other half, so that each example is unknown to exactly half of the models.
    """
    train, test = _training_data(facts, context)
    generator = torch.Generator().manual_seed(seed_of(facts["pair"], 5))
    member = torch.zeros(len(train), dtype=torch.bool)
    member[torch.randperm(len(train), generator=generator)[facts["half"] :: 2]] = True
    model = _fresh(facts, context)
    start = time.perf_counter()
    _recipe(facts, model, train.subset(member))
    seconds = time.perf_counter() - start
    logits = {
        name: predict(model, loader(part, batch_size=256))[0] for name, part in (("train", train), ("test", test))
    }
    files = {"logits.safetensors": lambda path: save_file({**logits, "member": member}, path)}
    Store(context.store).save("shadow", facts, {"seconds": seconds}, files)


def shadow_logits(facts: Mapping[str, Any], context: Context) -> list[dict[str, Tensor]]:
    """For each shadow model of a cell its logits on ``train`` and ``test``, and which training examples it saw."""
    store = Store(context.store)
    return [load_file(store.folder("shadow", f) / "logits.safetensors") for f in facts.get("shadows", ())]


def _prepare(facts: Mapping[str, Any], context: Context) -> None:
    model = _load_model("model", facts["model"], context)
    train, _ = _training_data(facts["model"], context)
    settings = dict(facts["prepare"])
    if settings.setdefault("method", "bgd") == "bgd":
        # As published, with each example's evidence in step with the steps.
        settings.setdefault("evidence", float(settings.setdefault("steps", 1000)))
    batch_size = settings.pop("batch_size", 64)
    start = time.perf_counter()
    posterior = prepare(
        model,
        methods.base.batches(train, batch_size=batch_size),
        seed=facts["model"]["seed"],
        backend=context.backend,
        progress=False,
        **settings,
    )
    value = {"seconds": time.perf_counter() - start, **posterior.metadata}
    Store(context.store).save("posterior", facts, value, {"posterior.safetensors": posterior.save})


def _task(facts: Mapping[str, Any], split: scenarios.Split, context: Context) -> Task:
    posterior = None
    if "posterior" in facts:
        folder = Store(context.store).folder("posterior", facts["posterior"])
        posterior = Posterior.load(folder / "posterior.safetensors", map_location=context.device)
    return Task(
        model=_load_model("model", facts["model"], context),
        forget=Counted(split.forget),
        retain=Counted(split.retain),
        fresh=functools.partial(_fresh, facts["model"], context),
        train=functools.partial(_recipe, facts["model"]),
        posterior=posterior,
        seed=facts["model"]["seed"],
        backend=context.backend,
    )


def _run(name: str, settings: Mapping[str, Any], task: Task) -> tuple[dict[str, float], ForgetReport | None]:
    with Peak(next(task.model.parameters()).device) as peak:
        start = time.perf_counter()
        report = methods.run(name, task, **settings)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    cost = {
        "seconds": seconds,
        "peak_memory_mib": peak.mib,
        "retain_reads": task.retain.reads,
        "retain_read_percent": 100.0 * task.retain.seen.double().mean().item(),
        "forget_reads": task.forget.reads,
    }
    return cost, report


def _retrain(facts: Mapping[str, Any], context: Context) -> None:
    split = make_split(facts["model"], facts["split"], context)
    task = _task(facts, split, context)
    cost, _ = _run("retrain", {}, task)
    _save_model("retrained", facts, context, task.model, cost)


def _unlearn(facts: Mapping[str, Any], context: Context) -> None:
    store = Store(context.store)
    split = make_split(facts["model"], facts["split"], context)
    task = _task(facts, split, context)
    before = copy.deepcopy(task.model)
    retrained = _load_model("retrained", facts["retrained"], context)
    # Not the bad teacher's own: the student would be measured by its teacher.
    incompetent = _fresh({**facts["model"], "seed": seed_of(facts["model"]["seed"], 6)}, context)
    report = None
    if facts["method"] == "retrain" and not facts["settings"]:
        task.model = retrained
        cost = store.load("retrained", facts["retrained"])
    else:
        cost, report = _run(facts["method"], facts["settings"], task)
    value: dict[str, Any] = {"cost": cost}
    references = measure.References(before, retrained, incompetent, shadow_logits(facts, context))
    value |= measure.measure(task.model, references, split, facts, report)
    store.save("cell", facts, value)


_WORK = {"model": _train, "retrained": _retrain, "posterior": _prepare, "shadow": _shadow, "cell": _unlearn}


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
