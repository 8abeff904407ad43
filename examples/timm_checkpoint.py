"""Forget a class of a large ViT that timm's own train.py fine-tuned, on one GPU, with little memory.

``--run`` is the folder that train.py wrote: args.yaml and model_best.pth.tar (or last.pth.tar). First, what it needs:

    python examples/timm_checkpoint.py plan --run output/train/my-vit-large --batch-size 8

While the training data is there, with the data set and the settings of args.yaml:

    python examples/timm_checkpoint.py prepare --run output/train/my-vit-large --batch-size 8 \
        --posterior posterior.safetensors

Later, with images of what is to be forgotten alone (to_forget/CLASS/*):

    python examples/timm_checkpoint.py forget --run output/train/my-vit-large --batch-size 8 \
        --posterior posterior.safetensors --images to_forget --out forgotten.safetensors
    python examples/timm_checkpoint.py evaluate --run output/train/my-vit-large --batch-size 8 \
        --weights forgotten.safetensors --forgotten dog

Where train.py itself ran with BGD (examples/timm_train_bgd.py), its last checkpoint holds the posterior already:

    python examples/timm_checkpoint.py extract --run output/train/my-bgd --posterior posterior.safetensors \
        --out means.safetensors
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from class_folders import batches, command_line, device_of_rank, evaluate, images, prepare, save
from rich.console import Console
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm_train_bgd import register
from torch import nn

import distruction
from distruction import planning


def trained(args: dict[str, Any], checkpoint: Path | str = "") -> nn.Module:
    """The model as train.py made it, with a checkpoint's weights: those of the EMA where it has them."""
    return timm.create_model(
        args["model"],
        num_classes=args["num_classes"],
        in_chans=args["in_chans"],
        global_pool=args["gp"],
        checkpoint_path=str(checkpoint),
        **args["model_kwargs"],
    )


def transform_of(args: dict[str, Any], model: nn.Module) -> Callable[[Any], Any]:
    """How train.py evaluates an image: cropped at the centre and not augmented."""
    return create_transform(**resolve_data_config(args, model=model))


def read(args: dict[str, Any], split: str, model: nn.Module) -> ImageDataset:
    """A split of the data set that train.py was given."""
    return create_dataset(
        args["dataset"],
        root=args["data_dir"] or args["data"],
        split=split,
        class_map=args["class_map"],
        transform=transform_of(args, model),
    )


def keep(posterior: distruction.Posterior, data: ImageDataset, path: Path) -> None:
    """Write a byte per parameter, and the classes' labels, which the images to forget need once the data is gone."""
    posterior.metadata["labels"] = data.reader.class_to_idx
    posterior.save(path, compress=True)


def extract(args: dict[str, Any], checkpoint: Path) -> tuple[nn.Module, distruction.Posterior]:
    """The model of the means, and the posterior: from the optimizer's state of a run with BGD, which goes by order."""
    register()
    model = trained(args)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(argparse.Namespace(**args)), **args["opt_kwargs"])
    with torch.serialization.safe_globals([argparse.Namespace]):
        optimizer.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["optimizer"])
    optimizer.eval()
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    means, stds = ({name: s[key] for name, s in state.items()} for key in ("mean", "std"))
    return model, distruction.Posterior(means, stds)


def best(run: Path) -> Path:
    """The run's best checkpoint, or its last where it did not validate."""
    path = run / "model_best.pth.tar"
    return path if path.is_file() else run / "last.pth.tar"


def show_plan(args: dict[str, Any], batch_size: int, device: torch.device) -> None:
    """Print what prepare and forget need, and what to change where that is not free."""
    with torch.device("meta"):
        model = trained(args)
    found = planning.plan(
        model,
        resolve_data_config(args, model=model)["input_size"],
        batch_size=batch_size,
        release_gradients=True,
        prior_std="log8",
        offload_prior=True,
        device=str(device),
    )
    Console().print(planning.table(found), *planning.verdict(found), sep="\n")


def main() -> None:
    """Plan, prepare, forget, evaluate or extract."""
    parser, commands = command_line(__doc__, "plan", "prepare", "forget", "evaluate", "extract")
    for command in commands.values():
        command.add_argument("--run", type=Path, required=True, help="folder that train.py wrote")
    commands["forget"].add_argument("--images", required=True, help="folder with a folder for each class to forget")
    for name in ("forget", "evaluate"):
        commands[name].add_argument("--weights", type=Path, help="in place of the run's best checkpoint")
    for name in ("posterior", "out"):
        commands["extract"].add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    args = yaml.safe_load((options.run / "args.yaml").read_text())
    device = device_of_rank()
    if options.command == "plan":
        show_plan(args, options.batch_size, device)
        return
    if options.command == "extract":
        model, posterior = extract(args, options.run / "last.pth.tar")
        save(model, options.out)
        keep(posterior, read(args, args["train_split"], model), options.posterior)
        return
    model = trained(args, getattr(options, "weights", None) or best(options.run)).to(device)
    if options.command == "prepare":
        data = read(args, args["train_split"], model)
        keep(prepare(model, data, options, release_gradients=True), data, options.posterior)
    elif options.command == "forget":
        posterior = distruction.Posterior.load(options.posterior, model=model)
        data = images(options.images, posterior.metadata["labels"], transform_of(args, model))
        distruction.forget(
            model,
            posterior.pin_memory() if device.type == "cuda" else posterior,
            batches(data, options),
            steps=options.steps,
            release_gradients=True,
            offload_prior=True,
        )
        save(model, options.out)
    else:
        evaluate(model, read(args, args["val_split"], model), options)


if __name__ == "__main__":
    main()
