"""The command line: ``distruction train | plan | prepare | forget | evaluate | demo | bench | doctor``."""

import math
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import bench as benches
from . import demo as demos
from . import distributed, doctor, models, objectives, ops, report
from . import plan as plans
from .compression import STORAGE
from .data import Images, detect, forget_split, load, loader
from .data.raw import named
from .data.sets import NAMES
from .errors import UsageError
from .files import check_writable, remove_leftovers
from .forget import forget as forget_
from .posterior import Posterior
from .prepare import prepare as prepare_
from .terminal import Command, run
from .train import train as train_

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""Machine unlearning without the retained data.

    While the training data is there: `train` (or bring your own model) and `prepare`. Later, with the forget set
    alone: `forget`. `demo` shows the whole on real data in a few minutes.""",
)

SEEDS = 2**63 - 1
"""The largest seed."""

MOST = 2**31 - 1
"""The largest count."""


def _positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not > 0 and finite")
    return value


def _seconds(value: float) -> float:
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


def _auto_or_number(text: str) -> float | str:
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
    float, typer.Option(min=0, callback=_seconds, help="Seconds between two checkpoints; 0: after every step.")
]


def _device(name: str) -> torch.device:
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _output(path: Path, overwrite: bool) -> Path:
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another file or pass --overwrite to replace it")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist; create it first")
    check_writable(path)
    remove_leftovers(path)
    return path


def _done(checkpoint: Path | None) -> None:
    """Delete the checkpoint, now that the result is on the disk."""
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def _alone(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(f"`{command}` runs in one process; start prepare and forget alone with torchrun")


def _check_root(name: str, root: Path | None) -> None:
    if name == "digits" and root is not None:
        raise UsageError(f"the digits come with scikit-learn, not from {root}; drop --data, or name a --dataset in it")


def _data_of(
    config: Mapping[str, Any], dataset: str | None, root: Path | None, *, need_test: bool, skip_unreadable: bool
) -> tuple[Images, Images]:
    """The data set of a model's file, or the one that is asked for instead.

    Raises:
        UsageError: it has other classes than the model, whose labels would then mean something else.
    """
    name = dataset or config.get("data", "digits")
    _check_root(name, root)
    parts = load(name, root, side=config["img_size"], need_test=need_test, skip_unreadable=skip_unreadable)
    classes = parts[0].classes
    if len(classes) != config["num_classes"] or list(classes) != config.get("classes", list(classes)):
        known = f": {named(config['classes'])}" if "classes" in config else ""
        raise UsageError(
            f"the model tells {config['num_classes']} classes apart{known}; the data set {name!r} has {len(classes)}: "
            f"{named(classes)}; pass the data that it was trained on"
        )
    return parts


@app.command(cls=Command)
def train(
    out: Annotated[Path, typer.Option(help="Model file to write.")],
    data: DataRoot = None,
    dataset: Dataset = None,
    model: Annotated[str, typer.Option(help="vit-micro, vit-micro-conv or a timm model.")] = "vit-micro",
    pretrained: Pretrained = None,
    img_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Input size of the model, to which images are resized; default: theirs."),
    ] = None,
    without_class: Annotated[
        list[str], typer.Option(help="Leave this class out: retraining, the gold standard; may be repeated.")
    ] = [],  # noqa: B006
    epochs: Annotated[int, typer.Option(min=1, max=MOST)] = demos.EPOCHS,
    lr: Annotated[float, typer.Option(callback=_positive, help="Peak learning rate of AdamW.")] = 2e-3,
    batch_size: BatchSize = 64,
    crop: Annotated[
        int, typer.Option(min=0, max=MOST, help="Augmentation: random shifts by up to this many pixels.")
    ] = 0,
    flip: Annotated[bool, typer.Option(help="Augmentation: random horizontal flips.")] = False,
    skip_unreadable: SkipUnreadable = False,
    seed: Seed = 0,
    device: Device = "auto",
    progress: Progress = True,
    overwrite: Overwrite = False,
) -> None:
    """Train a classifier, from scratch or from pretrained weights."""
    _alone("train")
    _output(out, overwrite)
    place = _device(device)
    dataset = dataset or detect(data)
    _check_root(dataset, data)
    parts = load(dataset, data, side=img_size, need_test=False, skip_unreadable=skip_unreadable)
    train_data, test_data = (part.to(place) for part in parts)
    side = train_data.images.shape[-1]
    config: dict[str, Any] = {
        "name": model,
        "num_classes": len(train_data.classes),
        "in_chans": train_data.images.shape[1],
        "img_size": img_size or side,
    }
    if without_class:
        _, train_data = forget_split(train_data, without_class)
    torch.manual_seed(seed)
    network = models.create(**config, pretrained=pretrained).to(place)
    if config["img_size"] != side:
        config["resize"] = True
        models.resize_inputs(network, config["img_size"])
    settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "crop": crop, "flip": flip}
    train_(network, train_data, **settings, seed=seed, progress=progress)
    models.save(network, out, {**config, "data": dataset, "classes": list(train_data.classes)})
    measured, name = (test_data, "test") if len(test_data) else (train_data, "training")
    accuracy = demos.accuracy(*demos.predict(network, loader(measured, batch_size=512)))
    Console().print(f"{out}: {accuracy:.1f} % on the {name} set")


@app.command(cls=Command)
def plan(
    model: Annotated[str, typer.Option(help="vit-micro, a timm model, or a model file written by `train`.")],
    img_size: Annotated[int, typer.Option(min=1, max=MOST, help="Side of the images in pixels.")] = 224,
    in_chans: Annotated[int, typer.Option(min=1, max=MOST, help="Channels of the images.")] = 3,
    num_classes: Annotated[int, typer.Option(min=1, max=MOST)] = 1000,
    batch_size: BatchSize = 64,
    dtype: Annotated[str, typer.Option(help=f"Of the parameters: {', '.join(plans.DTYPES)}.")] = "float32",
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
    if Path(model).is_file():
        config = models.config(model)
        model, num_classes = config["name"], config["num_classes"]
        in_chans, img_size = config["in_chans"], config["img_size"]
    found = plans.plan(
        model,
        (in_chans, img_size, img_size),
        batch_size=batch_size,
        num_classes=num_classes,
        dtype=dtype,
        mc_samples=mc_samples,
        release_gradients=release_gradients,
        prior_std=prior_std,
        prior_mean=prior_mean,
        offload_prior=offload_prior,
        objective=objective,
        device=("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        available=None if free_gib is None else int(free_gib * 2**30),
    )
    Console().print(plans.table(found))
    for line in plans.verdict(found):
        Console().print(line, soft_wrap=True, highlight=False)
    if found.fits is False:
        raise typer.Exit(1)


@app.command(cls=Command)
def prepare(
    model: ModelFile,
    out: Annotated[Path, typer.Option(help="Posterior file to write.")],
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    method: Annotated[str, typer.Option(help="gauss-newton, or the paper's bgd.")] = "gauss-newton",
    steps: Annotated[int | None, typer.Option(max=MOST, help="Updates; default 150, of bgd 1500.")] = None,
    std_init: Annotated[
        Any, typer.Option(parser=_auto_or_number, metavar="NUMBER|auto", help="Std to start from; auto: by tensor.")
    ] = "auto",
    evidence: Annotated[
        Any,
        typer.Option(
            parser=_auto_or_number, metavar="NUMBER|auto", help="Data points that each training example counts for."
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
    _output(out, overwrite)
    network, config = models.load(model, device=_device(device))
    parts = _data_of(config, dataset, data, need_test=False, skip_unreadable=skip_unreadable)
    train_data = parts[0].to(_device(device))
    posterior = prepare_(
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
    _done(checkpoint)
    facts = posterior.metadata
    Console().print(f"{out}: {posterior.numel():,} Gaussians, sampled accuracy {facts['sampled_accuracy']:.1f} %")


@app.command(cls=Command)
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
            parser=_auto_or_number, metavar="NUMBER|auto", help="lambda in [0, 1], larger keeps more; auto finds it."
        ),
    ] = "auto",
    level: Annotated[
        float | None, typer.Option(help="Probability of what is forgotten to end at; default 0.01 of a class.")
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
    _output(out, overwrite)
    if posterior_out is not None:
        _output(posterior_out, overwrite)
    network, config = models.load(model, device=_device(device))
    prior = Posterior.load(posterior, model=network)
    parts = _data_of(config, dataset, data, need_test=False, skip_unreadable=skip_unreadable)
    forget_data, _ = forget_split(parts[0].to(_device(device)), forget_class)
    result = forget_(
        network,
        prior.pin_memory() if offload_prior and torch.cuda.is_available() else prior,
        loader(forget_data, batch_size=batch_size, shuffle=True),
        previous=None if previous is None else Posterior.load(previous, model=network),
        request="class",
        objective=objective,
        steps=steps,
        kl_weight=kl_weight,
        level=level,
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
    _done(checkpoint)
    steps_done = len(result.history)
    Console().print(f"{out}: KL(q || p) {result.kl:.1f} nats after {steps_done} steps in {result.seconds:.1f} s")
    if result.probability is not None:
        Console().print(f"mean probability of the forgotten labels: {result.probability:.2g}")
    if result.advice:
        Console().print(f"The level {result.level} is not reached: {result.advice}.", soft_wrap=True)


@app.command(cls=Command)
def evaluate(
    model: ModelFile,
    forget_class: ForgetClasses,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    skip_unreadable: SkipUnreadable = False,
    device: Device = "auto",
) -> None:
    """Accuracy on the retained and the forgotten classes, and membership inference."""
    _alone("evaluate")
    network, config = models.load(model, device=_device(device))
    parts = _data_of(config, dataset, data, need_test=True, skip_unreadable=skip_unreadable)
    train_data, test_data = (part.to(_device(device)) for part in parts)
    row = demos.measure(network, train_data, test_data, forget_class)
    columns = {k: v for k, v in demos.COLUMNS.items() if k in row}
    name = dataset or config.get("data", "digits")
    Console().print(report.table(f"{name}, class {', '.join(forget_class)}", {str(model): row}, columns))


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option(help="Report folder to write.")] = Path("runs/demo"),
    forget_class: Annotated[
        list[str], typer.Option("--class", help="Digit to forget; repeat it for several, one at a time.")
    ] = ["3"],  # noqa: B006
    ablations: Annotated[bool, typer.Option(help="Also with a constant std and with a diagonal Fisher std.")] = False,
    seed: Annotated[
        list[int], typer.Option(min=0, max=SEEDS, help="Seed of everything that is drawn; may be repeated.")
    ] = [0],  # noqa: B006
    backend: Backend = "auto",
    progress: Progress = True,
    overwrite: Overwrite = False,
) -> None:
    """The main job on scikit-learn's digits: train, prepare, forget one class, compare with retraining."""
    _alone("demo")
    runs = demos.run_demo(
        out,
        classes=forget_class,
        seeds=seed,
        overwrite=overwrite,
        ablations=ablations,
        backend=backend,
        progress=progress,
    )
    title = f"digits, class {', '.join(forget_class)} forgotten, seed {', '.join(map(str, seed))}"
    rows = demos.summary(runs) if len(runs) > 1 else runs[0].rows
    console = Console()
    console.print(report.table(title, rows, demos.COLUMNS))
    if len(runs) > 1:
        worst = max(runs, key=lambda r: r.loss_of_retained)
        console.print(
            f"mean and standard deviation s (n - 1) of {len(runs)} runs; DiStruction's largest loss of D_r in one run: "
            f"{worst.loss_of_retained:.1f} points (class {worst.forget_class}, seed {worst.seed})"
        )
    console.print(f"report: {out}")


@app.command(cls=Command)
def bench(
    preset: Annotated[str | None, typer.Option(help=", ".join(benches.PRESETS))] = None,
    grid: Annotated[Path | None, typer.Option(help="TOML file of scenarios, methods and seeds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/bench/NAME.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where results are kept; default OUT/store.")] = None,
    data: DataRoot = None,
    pretrained: Pretrained = None,
    device: Annotated[str, typer.Option(help="Devices, with commas; auto takes every GPU or the CPU.")] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, max=1024, help="Processes per device; 0: one per GPU or CPU core.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, max=4096, help="CPU threads of each process.")] = 1,
    skip_unreadable: SkipUnreadable = False,
    backend: Backend = "auto",
    progress: Progress = True,
) -> None:
    """Run the paper's experiments: scenarios x methods x seeds. Start it again to resume."""
    _alone("bench")
    if (preset is None) == (grid is None):
        raise UsageError(f"pass either --preset ({', '.join(benches.PRESETS)}) or --grid FILE.toml")
    experiment = benches.preset(preset) if preset else benches.read(grid or Path())
    if "" in (str(out or "x").strip(". "), str(store or "x").strip(". ")):
        raise UsageError("--out and --store must name a folder of their own")
    if all(scenario.data == "digits" for scenario in experiment.scenarios):
        _check_root("digits", data)
    out = out or Path("runs/bench") / (preset or Path(grid or "").stem)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = gpus or ["cpu"] if device == "auto" else [str(_device(name)) for name in device.split(",")]
    for name in devices:
        ops.resolve(backend, torch.device(name).type)
    each = workers or (1 if devices != ["cpu"] else os.cpu_count() or 1)
    _, outcome = benches.run(
        experiment,
        out,
        benches.Context(store or out / "store", data, pretrained, backend=backend, skip_unreadable=skip_unreadable),
        devices=devices * each,
        threads=threads,
        command=shlex.join(["distruction", *sys.argv[1:]]),
        progress=progress,
    )
    console = Console()
    console.print(f"{outcome.done} jobs done, {outcome.reused} found finished; report: {out / 'report' / 'index.html'}")
    for title, message in outcome.failures.values():
        console.print(f"failed: {title}: {message.splitlines()[-1]}", style="red", markup=False)
    if outcome.failures:
        raise typer.Exit(1)


@app.command("doctor", cls=Command)
def doctor_() -> None:
    """Print versions, and which backend serves which device, to paste into a bug report."""
    typer.echo(doctor.report())


def main() -> None:
    """Run the command line: user errors end with one line and status 2, Ctrl-C with status 130."""
    run(app)


if __name__ == "__main__":
    main()
