"""The trained models that benchmarks start from: those of the experiments, taken from their store or put there."""

import dataclasses

from safetensors.torch import load_file
from torch import nn

from distruction.experiments.grid import Grid, preset
from distruction.experiments.jobs import Job, cells
from distruction.experiments.materials import Context, fresh
from distruction.experiments.store import Store
from distruction.experiments.work import ensure


def grid_of(name: str) -> Grid:
    """The experiments whose network and recipe a data set has here.

    digits: the demo's; fashion-mnist: the convolutional ViT, right on 90 % of the test images after five epochs.
    """
    return preset("demo" if name == "digits" else "fashion")


def trained(
    name: str, seed: int, context: Context, *, without: str | None = None, validation: float = 0.0
) -> nn.Module:
    """The data set's network, trained; ``distruction bench`` with the same store does not train it again.

    Args:
        name: ``digits`` or ``fashion-mnist``.
        context: of the store and the data.
        without: a class that it is trained without.
        validation: share of the training data that is held out (`distruction.data.hold_out`, seed 0).
    """
    grid = grid_of(name)
    scenario = grid.scenarios[0]
    if without is not None:
        scenario = dataclasses.replace(scenario, targets=(without,))
    grid = dataclasses.replace(
        grid, seeds=(seed,), scenarios=(scenario,), methods=("retrain",), sweep=None, validation=validation
    )
    (cell,) = cells(grid, context)
    kind = "model" if without is None else "retrained"
    job = Job(kind, cell.facts[kind])
    ensure(job, context)
    model = fresh(cell.facts["model"], context)
    model.load_state_dict(load_file(Store(context.store).folder(kind, job.facts) / "model.safetensors"))
    return model.eval()
