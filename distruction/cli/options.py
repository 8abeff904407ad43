"""Options that several commands share, and what every command checks."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import objectives, ops
from ..data import Images, load
from ..data.raw import named
from ..data.sets import NAMES
from ..errors import UsageError
from ..files import check_writable, remove_leftovers

SEEDS = 2**63 - 1
"""The largest seed."""

MOST = 2**31 - 1
"""The largest count."""


def positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not > 0 and finite")
    return value


def seconds(value: float) -> float:
    if math.isnan(value):
        raise typer.BadParameter("nan is no number of seconds")
    return value


DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder of the data set: CIFAR's Python archives or their .tar.gz, IDX files, a torchvision root, Parquet "
        "files, or train/ and test/ with a folder per class; what is there is detected. Default: Debian's packages.",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(NAMES)}, or a folder in --data. Default: the one that --data holds (digits without --data)."
    ),
]
DatasetOfModel = Annotated[str | None, typer.Option(help="As in `train`; default: what the model was trained on.")]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out image files that cannot be read, instead of stopping.")
]
Pretrained = Annotated[str | None, typer.Option(help="File of a timm model's pretrained weights, or hub.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU when there is one.")]
Backend = Annotated[str, typer.Option(help=f"auto, {', '.join(ops.MODULES)}.")]
Seed = Annotated[int, typer.Option(min=0, max=SEEDS, help="Seed of everything that is drawn.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the output where it exists.")]


def auto_or_number(text: str) -> float | str:
    """An option that is a number or ``auto``."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"it must be a number, not {text}, or 'auto'") from error


BatchSize = Annotated[int, typer.Option(min=1, max=MOST, help="Examples per forward pass.")]
ModelFile = Annotated[Path, typer.Option("--model", help="Model file (safetensors) written by `train` or `forget`.")]
ForgetClasses = Annotated[
    list[str], typer.Option("--class", help="Name of the class to forget; of several, forgotten together, repeat it.")
]
ObjectiveName = Annotated[
    str, typer.Option("--objective", help="; ".join(f"{n}: {e.summary}" for n, e in objectives.REGISTRY.items()))
]
CheckpointFile = Annotated[
    Path | None, typer.Option(help="Resume from this file and write it now and then; removed at the end.")
]
CheckpointSteps = Annotated[int | None, typer.Option(min=1, max=MOST, help="Also write it after so many steps.")]
ReleaseGradients = Annotated[
    bool, typer.Option(help="Drop each gradient inside the backward pass: same bits, less memory.")
]
CheckpointSeconds = Annotated[
    float, typer.Option(min=0, callback=seconds, help="Seconds between two checkpoints; 0: after every step.")
]


def device_of(name: str) -> torch.device:
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def output(path: Path, overwrite: bool) -> Path:
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another file or pass --overwrite to replace it")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist; create it first")
    check_writable(path)
    remove_leftovers(path)
    return path


def done(checkpoint: Path | None) -> None:
    """Delete the checkpoint, now that the result is on the disk."""
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def alone(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(f"`{command}` runs in one process; start prepare and forget alone with torchrun")


def check_root(name: str, root: Path | None) -> None:
    if name == "digits" and root is not None:
        raise UsageError(f"the digits come with scikit-learn, not from {root}; drop --data, or name a --dataset in it")


def data_of(
    config: Mapping[str, Any], dataset: str | None, root: Path | None, *, need_test: bool, skip_unreadable: bool
) -> tuple[Images, Images]:
    """The data set of a model's file, or the one that is asked for instead.

    Raises:
        UsageError: it has other classes than the model, whose labels would then mean something else.
    """
    name = dataset or config.get("data", "digits")
    check_root(name, root)
    parts = load(name, root, side=config["img_size"], need_test=need_test, skip_unreadable=skip_unreadable)
    classes = parts[0].classes
    if len(classes) != config["num_classes"] or list(classes) != config.get("classes", list(classes)):
        known = f": {named(config['classes'])}" if "classes" in config else ""
        raise UsageError(
            f"the model tells {config['num_classes']} classes apart{known}; the data set {name!r} has {len(classes)}: "
            f"{named(classes)}; pass the data that it was trained on"
        )
    return parts
