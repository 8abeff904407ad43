"""What a worker process does for each kind of job."""

import copy
import functools
import time
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import methods, models, scenarios
from ..data import Images, loader
from ..forget_report import ForgetReport
from ..methods import Counted, Task
from ..methods.ablations import constant_std, fisher_std
from ..metrics import predict
from ..posterior import Posterior
from ..preparation import prepare
from ..seeds import seed_of
from ..training import RECIPES
from . import measure
from .jobs import Job
from .materials import Context, fresh, make_split, network_of, training_data
from .memory import Peak
from .store import Store


def execute(job: Job, context: Context) -> float:
    """Do a job and write its entry; returns the seconds that it took."""
    start = time.perf_counter()
    _WORK[job.kind](job.facts, context)
    return time.perf_counter() - start


def ensure(job: Job, context: Context) -> None:
    """Do a job and what it needs, here and now, unless its entry is there."""
    if Store(context.store).load(job.kind, job.facts) is None:
        for need in job.needs():
            ensure(need, context)
        execute(job, context)


def _recipe(facts: Mapping[str, Any], context: Context, model: nn.Module, data: Dataset[Any]) -> None:
    settings = dict(facts["train"])
    RECIPES[settings.pop("recipe")](model, data, seed=facts["seed"], progress=context.progress, **settings)


def _train(facts: Mapping[str, Any], context: Context) -> None:
    train, _ = training_data(facts, context)
    model = fresh(facts, context)
    start = time.perf_counter()
    _recipe(facts, context, model, train)
    _save_model("model", facts, context, model, {"seconds": time.perf_counter() - start})


def _save_model(
    kind: str, facts: Mapping[str, Any], context: Context, model: nn.Module, value: Mapping[str, Any]
) -> None:
    state = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
    files = {"model.safetensors": lambda path: save_file(state, path)}
    Store(context.store).save(kind, facts, value, files)


def _load_model(kind: str, facts: Mapping[str, Any], context: Context) -> nn.Module:
    """The model of a ``model`` or ``retrained`` entry, whose presence the runner has checked."""
    model = fresh(facts.get("model", facts), context)
    model.load_state_dict(load_file(Store(context.store).folder(kind, facts) / "model.safetensors"))
    return model.eval()


def _shadow(facts: Mapping[str, Any], context: Context) -> None:
    """Train on one of the two halves of a random partition; keep the logits of everything, for attacks that need them.

    The pair's other model is trained on the other half, so that each example is unknown to exactly half of the models.
    """
    train, test = training_data(facts, context)
    generator = torch.Generator().manual_seed(seed_of(facts["pair"], 5))
    member = torch.zeros(len(train), dtype=torch.bool)
    member[torch.randperm(len(train), generator=generator)[facts["half"] :: 2]] = True
    model = fresh(facts, context)
    start = time.perf_counter()
    _recipe(facts, context, model, train.subset(member))
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
    train, _ = training_data(facts["model"], context)
    if "std" in facts:
        _replace_std(facts, model, train, context)
        return
    settings = dict(facts["prepare"])
    if settings.setdefault("method", "bgd") == "bgd":
        # As published, with each example's evidence in step with the steps.
        settings.setdefault("evidence", float(settings.setdefault("steps", 1000)))
    batches = loader(train, batch_size=settings.pop("batch_size", 64), shuffle=settings.pop("shuffle", False))
    start = time.perf_counter()
    posterior = prepare(
        model,
        batches,
        seed=facts["model"]["seed"],
        backend=context.backend,
        progress=context.progress,
        **settings,
    )
    value = {"seconds": time.perf_counter() - start, **posterior.metadata}
    Store(context.store).save("posterior", facts, value, {"posterior.safetensors": posterior.save})


def _replace_std(facts: Mapping[str, Any], model: nn.Module, train: Images, context: Context) -> None:
    """The ablations' posterior."""
    start = time.perf_counter()
    learnt = _load_posterior(facts["posterior"], context)
    posterior = constant_std(learnt) if facts["std"] == "constant" else fisher_std(model, train, learnt)
    files = {"posterior.safetensors": posterior.save}
    Store(context.store).save("posterior", facts, {"seconds": time.perf_counter() - start}, files)


def _load_posterior(facts: Mapping[str, Any], context: Context) -> Posterior:
    folder = Store(context.store).folder("posterior", facts)
    return Posterior.load(folder / "posterior.safetensors", map_location=context.device)


def _task(facts: Mapping[str, Any], split: scenarios.Split, context: Context) -> Task:
    return Task(
        model=_load_model("model", facts["model"], context),
        forget=Counted(split.forget),
        retain=Counted(split.retain),
        fresh=functools.partial(fresh, facts["model"], context),
        train=functools.partial(_recipe, facts["model"], context),
        posterior=_load_posterior(facts["posterior"], context) if "posterior" in facts else None,
        seed=facts["model"]["seed"],
        backend=context.backend,
        progress=context.progress,
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
    incompetent = fresh({**facts["model"], "seed": seed_of(facts["model"]["seed"], 6)}, context)
    report = None
    if facts["method"] == "retrain" and not facts["settings"]:
        task.model = retrained
        cost = store.load("retrained", facts["retrained"])
    else:
        cost, report = _run(facts["method"], facts["settings"], task)
    value: dict[str, Any] = {"cost": cost}
    references = measure.References(before, retrained, incompetent, shadow_logits(facts, context))
    value |= measure.measure(task.model, references, split, facts, report)
    files = {}
    if context.keep_models:
        described = {**network_of(facts["model"], split.test), "data": facts["model"]["data"]["name"]}
        files = {"model.safetensors": functools.partial(models.save, task.model, config=described)}
    store.save("cell", facts, value, files)


_WORK = {"model": _train, "retrained": _retrain, "posterior": _prepare, "shadow": _shadow, "cell": _unlearn}
