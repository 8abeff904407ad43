"""The experiments of the paper: scenarios x methods x seeds, resumable, with tables and figures."""


from . import jobs, runner
from .grid import Grid, preset, read
from .jobs import Context, Job
from .runner import Outcome
from .store import Store

__all__ = ["Context", "Grid", "Job", "Outcome", "Store", "preset", "read", "run"]


def run(experiment: Grid, context: Context, *, devices: list[str], threads: int = 1, progress: bool = True) -> Outcome:
    """Do what of the grid is not done yet.

    Args:
        experiment: from `preset` or `read`.
        context: where.
        devices: one worker process for each.
        threads: CPU threads of each worker.

    Raises:
        UsageError: a data set is missing, or another bench runs in the same folder.
    """
    with runner.alone(context.store):
        cells = jobs.cells(experiment, context)
        folder = context.store / "forget-sets"
        folder.mkdir(exist_ok=True)
        for name, split, facts in jobs.forget_sets(cells, context):
            from ..scenarios import write_indices

            write_indices(folder / name, split, facts)
        return runner.run(cells, context, devices=devices, threads=threads, progress=progress)
