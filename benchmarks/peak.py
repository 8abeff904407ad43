"""The peak that `distruction.planning` foretells against the one of a run on the CPU: ``python -m benchmarks.peak``.

Resident memory of the process, beyond what libraries hold after a run of a small model. Random weights and images.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from distruction import Posterior, forget, models, prepare, report
from distruction.experiments.memory import Peak
from distruction.planning import plan

from . import harness

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batches(size: int, img_size: int) -> Batches:
    """One batch of noise."""
    return [(torch.randn(size, 3, img_size, img_size), torch.arange(size) % 10)]


def run(name: str, data: Batches, **options: Any) -> tuple[float, float]:
    """Prepare and forget; returns the peaks of both beyond what was held before, in MiB."""
    options |= {"progress": False}
    with Peak(torch.device("cpu")) as prepared:
        model = models.create(name, num_classes=10, in_chans=3, img_size=data[0][0].shape[-1])
        prior: Posterior = prepare(model, data, evidence=100.0, **options)
    with Peak(torch.device("cpu")) as forgotten:
        forget(model, prior, data, request="class", kl_weight=0.1, **options)
    return prepared.mib, forgotten.mib + (forgotten.before - prepared.before) / 2**20


def main(
    model: Annotated[str, typer.Option(help="A timm model.")] = "vit_large_patch16_224",
    img_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 224,
    batch_size: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of prepare, and of forget.")] = 2,
    release_gradients: Annotated[bool, typer.Option()] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print planned and measured peaks in MiB."""
    run("vit-micro", batches(batch_size, 32), steps=1, release_gradients=release_gradients)
    gc.collect()
    data = batches(batch_size, img_size)
    measured = run(model, data, steps=steps, release_gradients=release_gradients)
    found = plan(
        model,
        (3, img_size, img_size),
        num_classes=10,
        batch_size=batch_size,
        release_gradients=release_gradients,
    )
    rows = {
        phase.name: {"planned_mib": round(phase.peak / 2**20, 1), "measured_mib": round(mib, 1)}
        for phase, mib in zip(found.phases, measured, strict=True)
    }
    print(json.dumps(rows))
    if out is not None:
        command = " ".join(["python -m benchmarks.peak", *sys.argv[1:]])
        report.write_json(out, {"command": command, **harness.environment(torch.device("cpu")), **rows})


if __name__ == "__main__":
    typer.run(main)
