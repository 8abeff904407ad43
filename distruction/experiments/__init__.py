"""The experiments of the paper: scenarios x methods x seeds, resumable, with tables and figures."""

from pathlib import Path

from ..scenarios import write_indices
from . import jobs, page, runner
from .grid import PRESETS, Grid, preset, read
from .materials import Context
from .results import Cell
from .runner import Outcome

__all__ = ["PRESETS", "Cell", "Context", "Grid", "Outcome", "preset", "read", "run"]


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
    """
    with runner.alone(context.store):
        cells = jobs.cells(grid, context)
        folder = out / "forget-sets"
        folder.mkdir(exist_ok=True, parents=True)
        for name, split, facts in jobs.forget_sets(cells, context):
            write_indices(folder / name, split, facts)
        outcome = runner.run(cells, context, devices=devices, threads=threads, progress=progress)
        found = page.write(out / "report", grid, context, cells, outcome, command)
    return found, outcome
