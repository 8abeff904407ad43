"""Options that several commands share, and what every command checks."""

import math
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from .. import objectives, ops, sources
from ..data import sets, tables
from ..data.inputs import Pixels
from ..data.raw import named
from ..data.requests import Selection, in_memory, load_quietly, of_model
from ..data.sets import NAMES
from ..errors import PosteriorError, UsageError
from ..files import check_writable, remove_leftovers
from ..posterior import Posterior

SEEDS = 2**63 - 1
"""The largest seed."""

MOST = 2**31 - 1
"""The largest count."""


def positive(value: float) -> float:
    """The value, which must be > 0 and finite."""
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not > 0 and finite")
    return value


def seconds(value: float) -> float:
    """The value, which must not be NaN."""
    if math.isnan(value):
        raise typer.BadParameter("nan is no number of seconds")
    return value


DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder of the data set: CIFAR's Python archives or their .tar.gz, IDX files, a torchvision root, Parquet "
        "files, a folder of datasets' save_to_disk, or train/ and test/ with a folder per class; what is there is "
        "detected. Default: Debian's packages.",
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
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="File written by `train` or `forget`; folder of timm's train.py or of save_pretrained; a timm name with "
        "--weights; or package.module:function.",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="File of weights (safetensors, .pth) of a timm name or a function.")]
ClassesFile = Annotated[
    Path | None,
    typer.Option("--classes", help="Names of the classes, one a line in the head's order, if the model lacks them."),
]
ForgetClasses = Annotated[
    list[str], typer.Option("--class", help="Name of the class to forget; of several, forgotten together, repeat it.")
]
Records = Annotated[
    Path | None,
    typer.Option(help="List of records: CSV with path (or row) and label, JSON lines, or text with one a line."),
]
Workers = Annotated[int, typer.Option(min=0, max=1024, help="Processes that read images which do not fit into memory.")]
LogJson = Annotated[Path | None, typer.Option(help="Append a JSON line for each step to this file.")]
TensorBoardFolder = Annotated[
    Path | None, typer.Option("--tensorboard", help="Write each step's figures for TensorBoard into this folder.")
]
WandBProject = Annotated[
    str | None, typer.Option("--wandb", help="Log each step's figures to this project of Weights & Biases.")
]
OBJECTIVE = typer.Option("--objective", help="; ".join(f"{n}: {e.summary}" for n, e in objectives.REGISTRY.items()))
ObjectiveName = Annotated[str, OBJECTIVE]
ObjectiveOrDefault = Annotated[str | None, OBJECTIVE]
CheckpointFile = Annotated[
    Path | None, typer.Option(help="Resume from this file and write it at intervals; removed at the end.")
]
CheckpointSteps = Annotated[int | None, typer.Option(min=1, max=MOST, help="Also write it after so many steps.")]
ReleaseGradients = Annotated[
    bool, typer.Option(help="Drop each gradient inside the backward pass: same bits, less memory.")
]
CheckpointSeconds = Annotated[
    float, typer.Option(min=0, callback=seconds, help="Seconds between two checkpoints; 0: after every step.")
]


def device_of(name: str) -> torch.device:
    """The device of that name; ``auto``: this rank's GPU where there is one, the CPU elsewhere."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def output(path: Path, overwrite: bool, *, folder: bool = False) -> Path:
    """Refuse a place that cannot be written, or where something is that is not to be replaced."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another file or pass --overwrite to replace it")
    if path.exists() and path.is_dir() != folder:
        raise UsageError(f"{path} is a {'folder' if path.is_dir() else 'file'}; choose another name for the result")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist; create it first")
    check_writable(path / "config.json" if path.is_dir() else path)
    remove_leftovers(path)
    return path


def done(checkpoint: Path | None) -> None:
    """Delete the checkpoint, now that the result is on the disk."""
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def holds(network: torch.nn.Module, posterior: Posterior) -> bool:
    """Whether the weights are the posterior's means."""
    try:
        posterior.check(network, same_weights=True)
    except PosteriorError:
        return False
    return True


def beside_means(posterior: Posterior, of: str) -> str:
    """What a preparation says of the posterior's samples, in words."""
    accuracy, at_means = (posterior.metadata[k] for k in ("sampled_accuracy", "accuracy_at_means"))
    beside = "" if at_means is None else f", the model itself {at_means:.1f} %"  # of an older version's checkpoint
    return f"its samples get {accuracy:.1f} % of the {of} right{beside}"


def alone(command: str) -> None:
    """Refuse a command under torchrun that runs in one process."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(f"`{command}` runs in one process; start prepare and forget alone with torchrun")


def check_root(name: str, root: Path | None) -> None:
    """Refuse a folder for the data set that comes with a package."""
    if name == "digits" and root is not None:
        raise UsageError(f"the digits come with scikit-learn, not from {root}; drop --data, or name a --dataset in it")


def open_source(
    model: str, weights: Path | None, classes: Path | None, device: str, *, read: bool = True
) -> sources.Model:
    """The model that the options name."""
    return sources.open_model(
        model, weights=weights, classes=sources.read_classes(classes), device=device_of(device), read=read
    )


def find_examples(
    source: sources.Model,
    dataset: str | None,
    root: Path | None,
    *,
    wanted: list[str] | None = None,
    records: Path | None = None,
    part: str = "train",
    skip_unreadable: bool = False,
) -> Selection:
    """The examples of a request, in the data set that the model was trained on or in the one that is named.

    Raises:
        UsageError: they are not there, or of classes that the model lacks.
    """
    wanted = wanted or []
    config = source.config
    root = root or (None if dataset else source.data)
    name = dataset or config.get("data") or ("digits" if config else ".")
    check_root(name, root)
    place = (root or Path()) / name
    if name in NAMES:
        whole = bool(dataset) or root is None or sets.is_kept_whole(name, root) or not root.is_dir()
    else:
        whole = bool(dataset) and not place.exists()
    if whole:
        side = source.inputs.side if isinstance(source.inputs, Pixels) else source.input_shape[-1]
        parts = load_quietly(name, root, side=side, need_test=part == "test", skip_unreadable=skip_unreadable)
        mine = of_model(parts, source.classes, config.get("num_classes"), source.inputs, name)
        source.classes = mine[0].classes
        return in_memory(mine[part == "test"], wanted=wanted, records=records, where=f"the data set {name!r}")
    if root is None and not dataset:
        raise UsageError("no images are named: pass their folder by --data")
    known = name in NAMES
    folder = place if not known and (place.is_dir() or tables.holds(place)) else root or place
    return source.select(folder, classes=wanted, records=records, part=part)


def members(found: Selection, names: list[str]) -> Tensor:
    """Mask of the examples of the classes."""
    if found.images is not None:
        mask = torch.zeros(len(found.labels), dtype=torch.bool)
        for name in names:
            mask |= found.images.members(name)
        return mask
    for name in names:
        if name not in found.classes:
            raise UsageError(f"class {name!r} is unknown; the model's classes are {named(found.classes, 20)}")
    labels = [list(found.classes).index(name) for name in names]
    return torch.isin(torch.tensor(found.labels), torch.tensor(labels))
