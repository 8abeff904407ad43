"""The experiments of the paper: scenarios x methods x seeds, resumable, with tables and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..scenarios import write_indices
from . import jobs
from .grid import PRESETS, Grid, preset, read
from .materials import Context

if TYPE_CHECKING:
    from .results import Cell
    from .runner import Outcome

__all__ = ["PRESETS", "Context", "Grid", "preset", "read", "run"]


def run(
    grid: Grid,
    out: Path,
    context: Context,
    *,
    devices: list[str],
    threads: int = 1,
    command: str = "",
    progress: bool = True,
) -> tuple[list[Cell], Outcome]:
    """Do what of the grid is not done yet, and write the report.

    Killed anywhere and started again it goes on where it was; finished cells are not run again.

    Args:
        grid: from `preset` or `read`.
        out: folder; ``out/report`` is the report, ``out/forget-sets`` the forgotten indices.
        context: where results are kept, where data is.
        devices: one worker process for each.
        threads: CPU threads of each worker.
        command: how to repeat this, for the report.

    Raises:
        UsageError: a data set is missing, or another bench runs in the same folder.
        MissingPackage: the extra ``experiments`` is not installed.
    """
    # The command line imports this package for the presets' names alone.
    from . import page, runner

    with runner.alone(context.store):
        cells = jobs.cells(grid, context)
        folder = out / "forget-sets"
        folder.mkdir(exist_ok=True, parents=True)
        for name, split, facts in jobs.forget_sets(cells, context):
            write_indices(folder / name, split, facts)
        outcome = runner.run(cells, context, devices=devices, threads=threads, progress=progress)
        found = page.write(out / "report", grid, context, cells, outcome, command)
    return found, outcome
