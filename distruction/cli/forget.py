"""``distruction forget``: a request."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .. import distributed, forgetting, models, objectives
from ..data import forget_split, loader
from ..posterior import Posterior
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
    ForgetClasses,
    ModelFile,
    ObjectiveName,
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


def forget(
    model: ModelFile,
    posterior: Annotated[Path, typer.Option(help="Posterior file written by `prepare`.")],
    out: Annotated[Path, typer.Option(help="Unlearned model file to write.")],
    forget_class: ForgetClasses,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    previous: Annotated[
        Path | None, typer.Option(help="Posterior that the request before this one left (--posterior-out).")
    ] = None,
    posterior_out: Annotated[
        Path | None, typer.Option(help="Also write what is left of the posterior, for a later request.")
    ] = None,
    objective: ObjectiveName = objectives.DEFAULT,
    steps: Annotated[
        int | None, typer.Option(max=MOST, help="Updates; default 150, or 400 at most where lambda is found.")
    ] = None,
    kl_weight: Annotated[
        Any,
        typer.Option(
            parser=auto_or_number, metavar="NUMBER|auto", help="lambda in [0, 1], larger keeps more; auto finds it."
        ),
    ] = "auto",
    level: Annotated[
        float | None, typer.Option(help="Probability of what is forgotten to end at; default 0.01 of a class.")
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(help="features: also disperse the class in front of the classifier, where few examples find it."),
    ] = None,
    cosine_level: Annotated[
        float | None, typer.Option(help="Mean cosine of the class's features to end at with --depth; default 0.25.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="Name of the layer that gives the logits, for --depth; default: looked for.")
    ] = None,
    mc_samples: Annotated[
        int, typer.Option(min=0, max=MOST, help="0: forget at the means; K: at K samples per update, as the paper.")
    ] = 0,
    data_per_step: Annotated[float, typer.Option(help="Weight of the objective, in data points.")] = 100.0,
    batch_size: BatchSize = 64,
    offload_prior: Annotated[
        bool, typer.Option(help="Keep the posterior in the CPU's memory; each step fetches it piece by piece.")
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
    """Forget a class, or several at once, reading the forget set and nothing else."""
    output(out, overwrite)
    if posterior_out is not None:
        output(posterior_out, overwrite)
    network, config = models.load(model, device=device_of(device))
    prior = Posterior.load(posterior, model=network)
    parts = data_of(config, dataset, data, need_test=False, skip_unreadable=skip_unreadable)
    forget_data, _ = forget_split(parts[0].to(device_of(device)), forget_class)
    result = forgetting.forget(
        network,
        prior.pin_memory() if offload_prior and torch.cuda.is_available() else prior,
        loader(forget_data, batch_size=batch_size, shuffle=True),
        previous=None if previous is None else Posterior.load(previous, model=network),
        request="class",
        objective=objective,
        steps=steps,
        kl_weight=kl_weight,
        level=level,
        depth=depth,  # type: ignore[arg-type]
        cosine_level=cosine_level,
        classifier=classifier,
        mc_samples=mc_samples,
        data_per_step=data_per_step,
        offload_prior=offload_prior,
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
    if posterior_out is not None:
        result.posterior.save(posterior_out)
    models.save(network, out, config)
    done(checkpoint)
    steps_done = len(result.history)
    Console().print(f"{out}: KL(q || p) {result.kl:.1f} nats after {steps_done} steps in {result.seconds:.1f} s")
    if result.probability is not None:
        Console().print(f"mean probability of the forgotten labels: {result.probability:.2g}")
    if result.cosine is not None:
        Console().print(f"mean cosine of their features: {result.cosine:.2f}")
    if result.advice:
        Console().print(f"The level {result.level} is not reached: {result.advice}.", soft_wrap=True)
