"""The experiment on language models: what is missing is run, in several processes; what is there is kept."""

import functools
import json
import os
import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import UsageError
from ...extras import needed
from ...files import write_text
from ...report import write_json
from ..runner import alone
from ..workers import Pool, done
from . import models, tables
from .arms import Arm
from .settings import ARMS, DEPTH, GRIDS, STRENGTHS
from .workshop import BEFORE, RETRAINING, Case, Workshop, say

with needed("language"):
    from transformers.utils.logging import disable_progress_bar

SCENARIOS = ("codes", "authors", "canaries")
SEEDS = (1, 2, 3)
"""Of the tables."""

Place = tuple[Path, Path | None, models.Size]
"""What a `Workshop` is made of."""


@dataclass(frozen=True)
class Job:
    """A part of the experiment that a worker does.

    Attributes:
        seed: of the models; without one the part is pretraining.
        scenario, name: of the row or the curve; without them the part is the model that knows all rows, prepared.
        arm: that forgets; without one the row is of the model before or of the retrained one.
    """

    seed: int | None = None
    scenario: str = ""
    name: str = ""
    arm: Arm | None = None

    def needs(self) -> tuple["Job", ...]:
        """Parts whose models this one reads."""
        if self.seed is None:
            return ()
        return (Job(self.seed),) if self.name else (Job(),)

    def do(self, shop: Workshop) -> dict[str, Any]:
        """What was measured; nothing of models."""
        if self.seed is None:
            shop.base()
            return {}
        if not self.name:
            shop.prior(self.seed, shop.memorised(self.seed))
            return {}
        return Case(shop, self.scenario, self.seed).measured(self.name, self.arm)


def named(scenario: str) -> list[str]:
    """What the table and the curves of a scenario are made of, in their order."""
    return [BEFORE, *ARMS[scenario], *(DEPTH if scenario == "codes" else ()), RETRAINING]


def rows(scenario: str, seed: int) -> list[Job]:
    """All rows and curves, from the end of the table: what takes longest comes first, so that workers end together."""
    return [Job(seed, scenario, n, {**DEPTH, **ARMS[scenario]}.get(n)) for n in reversed(named(scenario))]


def with_models(jobs: Collection[Job]) -> dict[Job, tuple[Job, ...]]:
    """Jobs and the models that they need, with what each needs: models first."""
    own = dict.fromkeys(model for job in jobs for model in job.needs())
    return {job: job.needs() for job in (*([Job()] if own else []), *own, *jobs)}


def measured(place: Place, jobs: Collection[Job], workers: int, threads: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Do the jobs, and the models that they need, and yield each that measures something when it is done."""
    with Pool(["cpu"] * workers, threads) as pool:

        def start(job: Job) -> Future[dict[str, Any]]:
            return pool.submit(_work, place, job)

        for job, future in done(with_models(jobs), start, workers):
            found = future.result()
            if job.name:
                yield job, found


def _work(place: Place, job: Job) -> dict[str, Any]:
    start = time.perf_counter()
    found = job.do(_workshop(place))
    if job.name:
        shown = found.get("at") or {k: round(v, 2) for k, v in found.items() if isinstance(v, float)}
        say(f"seed {job.seed}, {job.scenario}, {job.name}: {shown} ({time.perf_counter() - start:.0f} s)")
    return found


@functools.lru_cache(maxsize=1)
def _workshop(place: Place) -> Workshop:
    disable_progress_bar()  # of reading and writing models, in this process
    return Workshop(*place)


def trials() -> dict[str, Arm]:
    """Every strength and step size of the grids."""
    tried = {f"{n}, {v:g} tokens": replace(arm, tokens=v) for n, (arm, grid) in STRENGTHS.items() for v in grid}
    return tried | {f"{n}, lr {v:g}": replace(arm, lr=v) for n, (arm, grid) in GRIDS.items() for v in grid}


def tune(place: Place, out: Path, workers: int, threads: int) -> None:
    """Every trial that is not in ``tuning.json`` yet, on seed 0."""
    file = out / "tuning.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    jobs = [Job(0, "codes", name, arm) for name, arm in trials().items() if name not in found]
    for job, result in measured(place, jobs, workers, threads):
        found[job.name] = {k: v for k, v in result.items() if k != "looks"}
        write_json(file, {name: found[name] for name in trials() if name in found})


def run(
    out: Path,
    folder: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    scenarios: Sequence[str] = SCENARIOS,
    text: Path | None = None,
    size: str = "full",
    workers: int = 0,
    threads: int = 1,
    tuning: bool = False,
) -> list[dict[str, Any]]:
    """Run what is missing and write ``language.json``, ``language.md`` and ``language.png``; returns all runs.

    Results do not depend on ``workers``.

    Args:
        out: folder of the results.
        folder: of trained models.
        seeds, scenarios: that are run.
        text: a file of general text in place of Python's own.
        size: a name in `models.SIZES`.
        workers: processes; 0 for one per CPU core.
        threads: CPU threads of each.
        tuning: try the step sizes of the grids on seed 0 instead, and write ``tuning.json``.

    Raises:
        UsageError: a name is unknown, another process writes to ``out``, or ``out`` holds another experiment's runs.
    """
    for value, known in ((size, list(models.SIZES)), *((name, list(SCENARIOS)) for name in scenarios)):
        if value not in known:
            raise UsageError(f"{value!r} is unknown; choose {', '.join(known)}")
    workers = workers or os.cpu_count() or 1
    place = folder, text, models.SIZES[size]
    with alone(out):
        file = out / "language.json"
        stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        runs: list[dict[str, Any]] = stored.get("runs", [])
        if tuning:
            tune(place, out, workers, threads)
            return runs
        told = {"size": size, "text": "Python's own" if text is None else text.name}
        for key, value in told.items():
            if stored.get(key, value) != value:
                raise UsageError(f"{file} is of {key} {stored[key]!r}, not {value!r}; choose another folder")
        facts = told | {"python": platform.python_version(), "torch": torch.__version__, "threads": threads}
        there = {(r["seed"], r["scenario"], r["name"]) for r in runs}
        wanted = [job for name in scenarios for seed in seeds for job in rows(name, seed)]
        jobs = [job for job in wanted if (job.seed, job.scenario, job.name) not in there]
        for job, found in measured(place, jobs, workers, threads):
            runs.append({"scenario": job.scenario, "seed": job.seed, "name": job.name, **found})
            _write(out, facts, runs)
        tables.figure(runs, out / "language.png")
        return runs


def _write(out: Path, facts: Mapping[str, Any], runs: list[dict[str, Any]]) -> None:
    runs.sort(key=lambda r: (SCENARIOS.index(r["scenario"]), r["seed"], named(r["scenario"]).index(r["name"])))
    write_json(out / "language.json", {**facts, "runs": runs})
    write_text(out / "language.md", tables.table(runs))
