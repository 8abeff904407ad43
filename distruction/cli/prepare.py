"""``distruction prepare``: learning the posterior."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import distributed, models, preparation
from ..data import loader
from .options import (
    MOST,
    Backend,
    BatchSize,
    CheckpointFile,
    CheckpointSeconds,
    CheckpointSteps,
    DataRoot,
    DatasetOfModel,
    Device,
    ModelFile,
    Overwrite,
    Progress,
    ReleaseGradients,
    Seed,
    SkipUnreadable,
    auto_or_number,
    data_of,
    device_of,
    done,
    output,
)


def prepare(
    model: ModelFile,
    out: Annotated[Path, typer.Option(help="Posterior file to write.")],
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    method: Annotated[str, typer.Option(help="gauss-newton, or the paper's bgd.")] = "gauss-newton",
    steps: Annotated[int | None, typer.Option(max=MOST, help="Updates; default 150, of bgd 1500.")] = None,
    std_init: Annotated[
        Any, typer.Option(parser=auto_or_number, metavar="NUMBER|auto", help="Std to start from; auto: by tensor.")
    ] = "auto",
    evidence: Annotated[
        Any,
        typer.Option(
            parser=auto_or_number, metavar="NUMBER|auto", help="Data points that each training example counts for."
        ),
    ] = "auto",
    mc_samples: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Forward passes per update of bgd, default 2; even is better.")
    ] = None,
    batch_size: BatchSize = 64,
    compress: Annotated[
        bool, typer.Option(help="Keep a byte per parameter: 8-bit codes of std; the means are the model file's.")
    ] = False,
    checkpoint: CheckpointFile = None,
    checkpoint_seconds: CheckpointSeconds = 60.0,
    checkpoint_steps: CheckpointSteps = None,
    release_gradients: ReleaseGradients = False,
    skip_unreadable: SkipUnreadable = False,
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = "auto",
    progress: Progress = True,
    overwrite: Overwrite = False,
) -> None:
    """Learn the posterior, while the training data is there."""
    output(out, overwrite)
    network, config = models.load(model, device=device_of(device))
    parts = data_of(config, dataset, data, need_test=False, skip_unreadable=skip_unreadable)
    train_data = parts[0].to(device_of(device))
    posterior = preparation.prepare(
        network,
        loader(train_data, batch_size=batch_size, shuffle=True),
        method=method,
        steps=steps,
        std_init=std_init,
        evidence=evidence,
        mc_samples=mc_samples,
        seed=seed,
        backend=backend,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        checkpoint_steps=checkpoint_steps,
        keep_checkpoint=True,
        release_gradients=release_gradients,
        progress=progress,
    )
    if distributed.rank() > 0:
        return
    posterior.save(out, compress=compress)
    done(checkpoint)
    facts = posterior.metadata
    Console().print(f"{out}: {posterior.numel():,} Gaussians, sampled accuracy {facts['sampled_accuracy']:.1f} %")
