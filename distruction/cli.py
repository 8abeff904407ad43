"""The command line: ``distruction train | plan | prepare | forget | evaluate | demo | bench``."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console

from . import bench as benches
from . import demo as demos
from . import distributed, models, objectives, ops, report
from . import plan as plans
from .compression import STORAGE
from .data import Images, detect, forget_split, load, loader
from .data.sets import NAMES
from .errors import DistructionError, UsageError
from .files import check_writable, remove_leftovers
from .forget import forget as forget_
from .posterior import Posterior
from .prepare import prepare as prepare_
from .train import train as train_

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""Machine unlearning without the retained data.

    While the training data is there: `train` (or bring your own model) and `prepare`. Later, with the forget set
    alone: `forget`. `demo` shows the whole on real data in a few minutes.""",
)

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
Pretrained = Annotated[str | None, typer.Option(help="File of a timm model's pretrained weights, or hub.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU when there is one.")]
Backend = Annotated[str, typer.Option(help=f"auto, {', '.join(ops.MODULES)}.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the output where it exists.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per forward pass.")]
ModelFile = Annotated[Path, typer.Option("--model", help="Model file (safetensors) written by `train` or `forget`.")]
ForgetClass = Annotated[str, typer.Option("--class", help="Name of the class to forget.")]
ObjectiveName = Annotated[
    str, typer.Option("--objective", help="; ".join(f"{n}: {e.summary}" for n, e in objectives.REGISTRY.items()))
]
CheckpointFile = Annotated[
    Path | None, typer.Option(help="Resume from this file and write it now and then; removed at the end.")
]
CheckpointSteps = Annotated[int | None, typer.Option(min=1, help="Also write it after so many steps.")]
ReleaseGradients = Annotated[
    bool, typer.Option(help="Drop each gradient inside the backward pass: same bits, less memory.")
]
CheckpointSeconds = Annotated[float, typer.Option(min=0, help="Seconds between two checkpoints; 0: after every step.")]


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


def _data_of(config: Mapping[str, Any], dataset: str | None, root: Path | None) -> tuple[Images, Images]:
    """The data set of a model's file, or the one that is asked for instead."""
    return load(dataset or config.get("data", "digits"), root, side=config["img_size"])


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Model file to write.")],
    data: DataRoot = None,
    dataset: Dataset = None,
    model: Annotated[str, typer.Option(help="vit-micro or a timm model.")] = "vit-micro",
    pretrained: Pretrained = None,
    img_size: Annotated[
        int | None, typer.Option(min=1, help="Input size of the model, to which images are resized; default: theirs.")
    ] = None,
    without_class: Annotated[
        str | None, typer.Option(help="Leave this class out: retraining, the gold standard.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = demos.EPOCHS,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-3,
    batch_size: BatchSize = 64,
    crop: Annotated[int, typer.Option(min=0, help="Augmentation: random shifts by up to this many pixels.")] = 0,
    flip: Annotated[bool, typer.Option(help="Augmentation: random horizontal flips.")] = False,
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
    train_data, test_data = (part.to(place) for part in load(dataset, data, side=img_size))
    side = train_data.images.shape[-1]
    config: dict[str, Any] = {
        "name": model,
        "num_classes": len(train_data.classes),
        "in_chans": train_data.images.shape[1],
        "img_size": img_size or side,
    }
    if without_class is not None:
        _, train_data = forget_split(train_data, without_class)
    torch.manual_seed(seed)
    network = models.create(**config, pretrained=pretrained).to(place)
    if config["img_size"] != side:
        config["resize"] = True
        models.resize_inputs(network, config["img_size"])
    settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "crop": crop, "flip": flip}
    train_(network, train_data, **settings, seed=seed, progress=progress)
    models.save(network, out, {**config, "data": dataset})
    accuracy = demos.accuracy(*demos.predict(network, loader(test_data, batch_size=512)))
    Console().print(f"{out}: {accuracy:.1f} % on the test set")


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="vit-micro, a timm model, or a model file written by `train`.")],
    img_size: Annotated[int, typer.Option(min=1, help="Side of the images in pixels.")] = 224,
    in_chans: Annotated[int, typer.Option(min=1, help="Channels of the images.")] = 3,
    num_classes: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: BatchSize = 64,
    dtype: Annotated[str, typer.Option(help=f"Of the parameters: {', '.join(plans.DTYPES)}.")] = "float32",
    mc_samples: Annotated[int, typer.Option(min=1, help="Forward passes per update.")] = 2,
    release_gradients: ReleaseGradients = False,
    prior_std: Annotated[str, typer.Option(help=f"How the prior's std is kept: {', '.join(STORAGE)}.")] = "float32",
    prior_mean: Annotated[str, typer.Option(help=f"How its mean is kept: {', '.join(STORAGE[:2])}.")] = "float32",
    offload_prior: Annotated[bool, typer.Option(help="The prior stays in the CPU's memory.")] = False,
    objective: ObjectiveName = objectives.DEFAULT,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU when there is one.")] = "auto",
    free_gib: Annotated[
        float | None, typer.Option("--free", min=0, help="GiB that are free there; default: ask it.")
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


@app.command()
def prepare(
    model: ModelFile,
    out: Annotated[Path, typer.Option(help="Posterior file to write.")],
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    method: Annotated[str, typer.Option(help="gauss-newton, or the paper's bgd.")] = "gauss-newton",
    steps: Annotated[int | None, typer.Option(help="Updates; default 150, of bgd 1500.")] = None,
    std_init: Annotated[float, typer.Option(help="Std to start from, and its cap.")] = 0.1,
    evidence: Annotated[float, typer.Option(help="Data points that each training example counts for.")] = 1500.0,
    mc_samples: Annotated[
        int | None, typer.Option(min=1, help="Forward passes per update of bgd, default 2; even is better.")
    ] = None,
    batch_size: BatchSize = 64,
    compress: Annotated[
        bool, typer.Option(help="Keep a byte per parameter: 8-bit codes of std; the means are the model file's.")
    ] = False,
    checkpoint: CheckpointFile = None,
    checkpoint_seconds: CheckpointSeconds = 60.0,
    checkpoint_steps: CheckpointSteps = None,
    release_gradients: ReleaseGradients = False,
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = "auto",
    progress: Progress = True,
    overwrite: Overwrite = False,
) -> None:
    """Learn the posterior, while the training data is there."""
    _output(out, overwrite)
    network, config = models.load(model, device=_device(device))
    train_data = _data_of(config, dataset, data)[0].to(_device(device))
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


@app.command()
def forget(
    model: ModelFile,
    posterior: Annotated[Path, typer.Option(help="Posterior file written by `prepare`.")],
    out: Annotated[Path, typer.Option(help="Unlearned model file to write.")],
    forget_class: ForgetClass,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    objective: ObjectiveName = objectives.DEFAULT,
    previous: Annotated[
        Path | None,
        typer.Option(help="Posterior of the request before this one (--posterior-out); MODEL is its result."),
    ] = None,
    posterior_out: Annotated[
        Path | None, typer.Option(help="Posterior file to write, which remembers the request; the next one needs it.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="BGD updates; default: 150, or at most 400 where lambda is found.")
    ] = None,
    kl_weight: Annotated[str, typer.Option(help="lambda in [0, 1]; larger keeps more. auto finds it.")] = "auto",
    level: Annotated[
        float | None, typer.Option(help="Mean probability of the class to end at, with auto; default 0.01.")
    ] = None,
    data_per_step: Annotated[float, typer.Option(help="Weight of the objective, in data points.")] = 100.0,
    batch_size: BatchSize = 64,
    offload_prior: Annotated[
        bool, typer.Option(help="Keep the posterior in the CPU's memory; each step fetches it piece by piece.")
    ] = False,
    checkpoint: CheckpointFile = None,
    checkpoint_seconds: CheckpointSeconds = 60.0,
    checkpoint_steps: CheckpointSteps = None,
    release_gradients: ReleaseGradients = False,
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = "auto",
    progress: Progress = True,
    overwrite: Overwrite = False,
) -> None:
    """Forget one class, reading the forget set and nothing else."""
    for path in filter(None, (out, posterior_out)):
        _output(path, overwrite)
    weight = _weight(kl_weight)
    network, config = models.load(model, device=_device(device))
    prior = Posterior.load(posterior, model=network)
    forget_data, _ = forget_split(_data_of(config, dataset, data)[0].to(_device(device)), forget_class)
    result = forget_(
        network,
        prior.pin_memory() if offload_prior and torch.cuda.is_available() else prior,
        loader(forget_data, batch_size=batch_size, shuffle=True),
        previous=None if previous is None else Posterior.load(previous, model=network),
        request="class",
        objective=objective,
        steps=steps,
        kl_weight=weight,
        level=level,
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
    models.save(network, out, config)
    if posterior_out is not None:
        result.posterior.save(posterior_out)
    _done(checkpoint)
    Console().print(
        f"{out}: mean probability of the class {result.probability:.4f}, KL(q || p) {result.kl:.1f} nats after "
        f"{len(result.history)} steps in {result.seconds:.1f} s"
    )
    if result.advice:
        state = "reached" if result.reached else "not reached"
        Console().print(f"The level {result.level} is {state}: {result.advice}.")


def _weight(value: str) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"kl_weight (lambda) must be in [0, 1], not {value}, or 'auto'") from None


@app.command()
def evaluate(
    model: ModelFile,
    forget_class: ForgetClass,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    device: Device = "auto",
) -> None:
    """Accuracy on the retained and the forgotten class, and membership inference."""
    _alone("evaluate")
    network, config = models.load(model, device=_device(device))
    train_data, test_data = (part.to(_device(device)) for part in _data_of(config, dataset, data))
    row = demos.measure(network, train_data, test_data, forget_class)
    columns = {k: v for k, v in demos.COLUMNS.items() if k in row}
    name = dataset or config.get("data", "digits")
    Console().print(report.table(f"{name}, class {forget_class}", {str(model): row}, columns))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Report folder to write.")] = Path("runs/demo"),
    forget_class: Annotated[list[str], typer.Option("--class", help="Digit to forget; may be repeated.")] = ["3"],  # noqa: B006
    ablations: Annotated[bool, typer.Option(help="Also with a constant std and with a diagonal Fisher std.")] = False,
    seed: Annotated[list[int], typer.Option(help="Seed of everything that is drawn; may be repeated.")] = [0],  # noqa: B006
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
            f"mean ± standard deviation of {len(runs)} runs; DiStruction's largest loss of D_r in one run: "
            f"{worst.loss_of_retained:.1f} points (class {worst.forget_class}, seed {worst.seed})"
        )
    console.print(f"report: {out}")


@app.command()
def bench(
    preset: Annotated[str | None, typer.Option(help=", ".join(benches.PRESETS))] = None,
    grid: Annotated[Path | None, typer.Option(help="TOML file of scenarios, methods and seeds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/bench/NAME.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where results are kept; default OUT/store.")] = None,
    data: DataRoot = None,
    pretrained: Pretrained = None,
    device: Annotated[str, typer.Option(help="Devices, with commas; auto takes every GPU or the CPU.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes per device; 0: one per GPU or CPU core.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    backend: Backend = "auto",
    progress: Progress = True,
) -> None:
    """Run the paper's experiments: scenarios x methods x seeds. Start it again to resume."""
    _alone("bench")
    if (preset is None) == (grid is None):
        raise UsageError(f"pass either --preset ({', '.join(benches.PRESETS)}) or --grid FILE.toml")
    experiment = benches.preset(preset) if preset else benches.read(grid or Path())
    out = out or Path("runs/bench") / (preset or Path(grid or "").stem)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = gpus or ["cpu"] if device == "auto" else [str(_device(name)) for name in device.split(",")]
    each = workers or (1 if devices != ["cpu"] else os.cpu_count() or 1)
    _, outcome = benches.run(
        experiment,
        out,
        benches.Context(store or out / "store", data, pretrained, backend=backend),
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


def main() -> None:
    """Run the command line: user errors end with one line and status 2, Ctrl-C with status 130."""
    try:
        app(standalone_mode=True)
    except (DistructionError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
