"""The main job on real data that needs no download: train, prepare, drop the data, forget, compare.

The preset ``demo`` in this process, with the models and pictures of each run in a report folder.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import methods, ops, report
from ..errors import UsageError
from . import figures
from .grid import preset
from .jobs import Job, cells
from .materials import Context, make_split
from .results import Cell, collect, described
from .store import Store
from .work import ensure

MODEL: dict[str, Any] = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}
"""What `models.create` makes the preset's network of, on the digits."""

COLUMNS = ("retain", "forget", "forget_train", "mia_entropy", "kl", "seconds", "retain_reads")
"""The metrics to show, of `results.COLUMNS`."""

OURS = "distruction-auto"


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        cells: one for each seed, forgotten class and method.
        phases: seconds of each phase over all runs, without the measurements.
    """

    cells: Sequence[Cell]
    phases: Mapping[str, float]

    def loss_of_retained(self) -> tuple[float, str, int]:
        """Most points of D_r that DiStruction lost against the baseline, with the run's class and seed."""
        retain = {(c.method, c.place): c.numbers["retain"] for c in self.cells}
        return max(
            (retain["baseline", c.place] - retain[OURS, c.place], c.target, c.seed)
            for c in self.cells
            if c.method == OURS
        )


def run(
    out: Path,
    *,
    classes: Sequence[str],
    seeds: Sequence[int],
    overwrite: bool,
    ablations: bool,
    backend: str,
    progress: bool,
) -> Demo:
    """Run the demo for each seed and forgotten class, and write its report folder.

    Args:
        out: report folder; holds metrics.json and, for each run, a folder ``class-C-seed-S`` with curves.png,
            examples.png, posterior.safetensors and model.safetensors (the unlearned model).
        classes: digits to forget, one at a time.
        seeds: of everything that is drawn.
        overwrite: replace ``out`` where it exists.
        ablations: also forget with a constant std and with a diagonal Fisher std.
        backend: see `distruction.ops`.
        progress: show progress bars.
    """
    ops.resolve(backend, "cpu")
    for given in (classes, seeds):
        if len(set(given)) < len(given):
            raise UsageError(f"name each class and each seed once, not {', '.join(map(str, given))}")
    grid = preset("demo")
    grid = replace(
        grid,
        seeds=tuple(seeds),
        scenarios=(replace(grid.scenarios[0], targets=tuple(classes)),),
        methods=tuple(m for m in grid.methods if ablations or not methods.get(m).ablation),
    )
    with report.folder(out, overwrite=overwrite) as draft, _one_thread():
        context = Context(draft / "store", backend=backend, keep_models=True, progress=progress)
        jobs = cells(grid, context)
        # Ours first, so that the phases come in the order of a user's.
        for job in sorted(jobs, key=lambda job: (job.facts["model"]["seed"], job.facts["method"] != OURS)):
            ensure(job, context)
        store = Store(context.store)
        found = collect(jobs, store)
        for cell in found:
            if cell.method == OURS:
                _write_run(draft / f"class-{cell.target}-seed-{cell.seed}", cell, context)
        result = Demo(found, phases(found, store))
        report.write_json(
            draft / "metrics.json",
            {
                "data": "digits",
                "model": MODEL["name"],
                "backend": backend,
                "torch": torch.__version__.split("+")[0],
                "seconds": result.phases,
                "cells": described(found),
            },
        )
        shutil.rmtree(context.store)
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker of the bench: the same bits on any number of cores, and as quick on a model of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def phases(cells: Sequence[Cell], store: Store) -> dict[str, float]:
    """Seconds of each phase over all runs; what several cells share was done once."""

    def unlearning(*names: str) -> float:
        return sum(c.numbers["seconds"] for c in cells if c.method in names)

    def needed(kind: str, *names: str) -> float:
        jobs = {
            job.id: job for c in cells if c.method in names for job in Job("cell", c.facts).needs() if job.kind == kind
        }
        return sum(store.load(kind, job.facts)["seconds"] for job in jobs.values())  # type: ignore[index]

    found = {
        "train": needed("model", OURS),
        "prepare, the training data still there": needed("posterior", OURS),
        "forget, with the forget set alone": unlearning(OURS),
        "retrain, to compare with": unlearning("retrain"),
    }
    others = [c.method for c in cells if methods.get(c.method).ablation]
    return {**found, "ablations": unlearning(*others) + needed("posterior", *others)} if others else found


def _write_run(folder: Path, cell: Cell, context: Context) -> None:
    """The pictures of a cell, its posterior of preparation and its unlearned model."""
    folder.mkdir()
    store = Store(context.store)
    for kind, facts, name in (
        ("posterior", cell.facts["posterior"], "posterior.safetensors"),
        ("cell", cell.facts, "model.safetensors"),
    ):
        shutil.copyfile(store.folder(kind, facts) / name, folder / name)
    figures.curves({"": cell.value["history"]}).savefig(folder / "curves.png", dpi=150)
    split = make_split(cell.facts["model"], cell.facts["split"], context)
    figures.predictions(cell, split).savefig(folder / "examples.png", dpi=150)
