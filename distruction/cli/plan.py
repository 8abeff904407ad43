"""``distruction plan``: the memory that a run will need."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from .. import models, objectives, planning, sources
from ..compression import STORAGE
from . import language
from .options import MOST, BatchSize, ObjectiveName, ReleaseGradients, Weights


def plan(
    model: Annotated[str, typer.Option(help="vit-micro, a timm model, or whatever `prepare` takes.")],
    weights: Weights = None,
    img_size: Annotated[int, typer.Option(min=1, max=MOST, help="Side of the images in pixels.")] = 224,
    in_chans: Annotated[int, typer.Option(min=1, max=MOST, help="Channels of the images.")] = 3,
    num_classes: Annotated[int, typer.Option(min=1, max=MOST)] = 1000,
    length: Annotated[int, typer.Option(min=2, max=MOST, help="Tokens of a text of a language model.")] = 512,
    batch_size: BatchSize = 64,
    dtype: Annotated[str, typer.Option(help=f"Of the parameters: {', '.join(planning.DTYPES)}.")] = "float32",
    mc_samples: Annotated[
        int, typer.Option(min=1, max=MOST, help="Samples per update; 1 also of forgetting at the means.")
    ] = 1,
    release_gradients: ReleaseGradients = False,
    prior_std: Annotated[str, typer.Option(help=f"How the prior's std is kept: {', '.join(STORAGE)}.")] = "float32",
    prior_mean: Annotated[str, typer.Option(help=f"How its mean is kept: {', '.join(STORAGE[:2])}.")] = "float32",
    offload_prior: Annotated[bool, typer.Option(help="The prior stays in the CPU's memory.")] = False,
    objective: ObjectiveName = objectives.DEFAULT,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU when there is one.")] = "auto",
    free_gib: Annotated[
        float | None, typer.Option("--free", min=0, max=MOST, help="GiB that are free there; default: ask it.")
    ] = None,
) -> None:
    """Say how much memory prepare and forget will need, before anything is allocated."""
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "dtype": dtype,
        "mc_samples": mc_samples,
        "release_gradients": release_gradients,
        "prior_std": prior_std,
        "prior_mean": prior_mean,
        "offload_prior": offload_prior,
        "objective": objective,
        "device": ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        "available": None if free_gib is None else int(free_gib * 2**30),
    }
    known: nn.Module | str = model
    shape = (in_chans, img_size, img_size)
    if language.is_language_model(model):
        found = language.plan(model, length, **options)
    else:
        if Path(model).is_file():
            config = models.config(model)
            known, num_classes = config["name"], config["num_classes"]
            shape = (config["in_chans"], config["img_size"], config["img_size"])
        elif Path(model).is_dir() or ":" in model or weights is not None:
            source = sources.open_model(model, weights=weights, read=False)
            known, shape = source.network, source.input_shape
        found = planning.plan(known, shape, num_classes=num_classes, **options)
    Console().print(planning.table(found))
    for line in planning.verdict(found):
        Console().print(line, soft_wrap=True, highlight=False)
    if found.fits is False:
        raise typer.Exit(1)
