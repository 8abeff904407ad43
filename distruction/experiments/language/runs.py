"""The experiment on language models: what is missing is run, in several processes; what is there is kept."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import DistructionError, UsageError
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

    @property
    def title(self) -> str:
        """For people."""
        if self.seed is None:
            return "pretraining"
        return ", ".join(filter(None, [f"seed {self.seed}", self.scenario, self.name or "its model"]))

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
    """Do the jobs, and the models that they need, and yield each that measures something when it is done.

    Raises:
        DistructionError: jobs failed; all others, but for those that need them, are done.
    """
    failed = []
    with Pool(["cpu"] * workers, threads) as pool:

        def start(job: Job) -> Future[dict[str, Any]]:
            return pool.submit(_work, place, job)

        for job, future in done(with_models(jobs), start, workers):
            error = future.exception()
            if error is None:
                if job.name:
                    yield job, future.result()
            elif isinstance(error, Exception):
                say(f"{job.title} failed: {''.join(traceback.format_exception(error)).strip()}")
                failed.append(f"{job.title} ({error})")
            else:
                raise error
    if failed:
        raise DistructionError(f"failed, and what needs them was not run: {'; '.join(failed)}. What is done is kept.")


def _work(place: Place, job: Job) -> dict[str, Any]:
    start = time.perf_counter()
    found = job.do(_workshop(place))
    if job.name:
        shown = found.get("at") or {k: round(v, 2) for k, v in found.items() if isinstance(v, float)}
        say(f"{job.title}: {shown} ({time.perf_counter() - start:.0f} s)")
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
    found = _stored(file)
    jobs = [Job(0, "codes", name, arm) for name, arm in trials().items() if name not in found]
    for job, result in measured(place, jobs, workers, threads):
        found[job.name] = {k: v for k, v in result.items() if k != "looks"}
        ordered = {name: found[name] for name in trials() if name in found}
        write_json(file, ordered | found)


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

    Results, but for ``seconds``, do not depend on ``workers``.

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
        UsageError: a name is unknown, another process writes to a folder, or one is of another size or other texts, or
            of other ``threads``, with which models are others.
        DistructionError: see `measured`.
    """
    for value, known in ((size, list(models.SIZES)), *((name, list(SCENARIOS)) for name in scenarios)):
        if value not in known:
            raise UsageError(f"{value!r} is unknown; choose {', '.join(known)}")
    workers = workers or os.cpu_count() or 1
    place = folder, text, models.SIZES[size]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    facts = {"size": size, "text": _name(text), **versions, "threads": threads}
    with contextlib.ExitStack() as locks:
        for path in {out.resolve(), folder.resolve()}:
            locks.enter_context(alone(path))
        stored, made_of = _stored(out / "language.json"), folder / "made_of.json"
        for file, found in ((out / "language.json", stored), (made_of, _stored(made_of))):
            _check_same(file, found, facts)
        if not made_of.exists():
            write_json(made_of, facts)
        if tuning:
            tune(place, out, workers, threads)
            return list(stored.get("runs", []))
        runs: list[dict[str, Any]] = stored.get("runs", [])
        there = {(r["seed"], r["scenario"], r["name"]) for r in runs}
        wanted = [job for name in scenarios for seed in seeds for job in rows(name, seed)]
        jobs = [job for job in wanted if (job.seed, job.scenario, job.name) not in there]
        try:
            for job, found in measured(place, jobs, workers, threads):
                runs.append({"scenario": job.scenario, "seed": job.seed, "name": job.name, **found})
                runs.sort(key=_place)
                write_json(out / "language.json", {**facts, "runs": runs})
        finally:
            write_text(out / "language.md", tables.table(runs))
        tables.figure(runs, out / "language.png")
        return runs


def _place(run: Mapping[str, Any]) -> tuple[int, int, int]:
    """Where a run stands among all others."""
    return SCENARIOS.index(run["scenario"]), run["seed"], named(run["scenario"]).index(run["name"])


def _name(text: Path | None) -> str:
    """Of the general text: Python's own differs from one version to the next."""
    if text is None:
        return "Python's own"
    return f"{text.name}, sha256 {hashlib.sha256(text.read_bytes()).hexdigest()}"


def _stored(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _check_same(file: Path, found: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Models and results of other settings are not gone on with."""
    compared = ["size", "text", "threads", *(["python"] if facts["text"] == _name(None) else [])]
    for name in compared:
        if found.get(name, facts[name]) != facts[name]:
            raise UsageError(f"{file} is of {name} {found[name]!r}, not {facts[name]!r}; choose another folder")
