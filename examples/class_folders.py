"""What the examples share: images in class folders, this process's device, the command line, and a file of weights."""

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.data import ImageDataset, create_dataset
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, DistributedSampler

import distruction
from distruction import distributed
from distruction.files import write_atomically
from distruction.metrics import accuracy, predict


def command_line(doc: str | None, *names: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """A parser of the commands ``names``, and theirs, with the options that the examples have in common."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    subparsers = parser.add_subparsers(dest="command", required=True)
    commands = {name: subparsers.add_parser(name) for name in names}
    for name, command in commands.items():
        command.add_argument("--batch-size", type=int, default=64, help="of all ranks together")
        command.add_argument("--workers", type=int, default=4, help="processes that read images")
        if name in ("prepare", "forget"):
            command.add_argument("--posterior", type=Path, required=True)
            command.add_argument("--steps", type=int)
        if name == "prepare":
            command.add_argument("--std-init", type=float, help="std to start from; default: each tensor's own scale")
            command.add_argument("--method", choices=["gauss-newton", "bgd"], default="gauss-newton")
        if name == "forget":
            command.add_argument("--kl-weight", type=float, help="lambda; default: found by itself")
            command.add_argument("--out", type=Path, required=True)
        if name == "evaluate":
            command.add_argument("--forgotten", required=True, help="the class that was forgotten")
    return parser, commands


def device_of_rank() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def images(folder: str, labels: Mapping[str, int], transform: Callable[[Any], Any]) -> ImageDataset:
    """The images in ``folder/CLASS/`` with the labels of their classes, some of which may have no folder."""
    if unknown := sorted({p.name for p in Path(folder).iterdir() if p.is_dir()} - set(labels)):
        raise distruction.UsageError(
            f"{folder} has folders that are no classes of the model: {', '.join(unknown)}; its classes are "
            f"{', '.join(labels)}"
        )
    return create_dataset("", root=folder, search_split=False, class_map=dict(labels), transform=transform)


def batches(data: ImageDataset, args: argparse.Namespace, *, shuffle: bool = True) -> DataLoader:
    """Batches of ``args.batch_size`` images; of several ranks each reads its part of them."""
    ranks = distributed.size()
    sampler = DistributedSampler(data) if shuffle and ranks > 1 else None
    return DataLoader(
        data,
        args.batch_size if sampler is None else max(1, args.batch_size // ranks),
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
    )


def prepare(model: nn.Module, data: ImageDataset, args: argparse.Namespace, **options: Any) -> distruction.Posterior:
    """Learn the posterior, and say how well its samples do: far worse than the model is a sign of too wide a std."""
    posterior = distruction.prepare(
        model,
        batches(data, args),
        method=args.method,
        steps=args.steps,
        std_init="auto" if args.std_init is None else args.std_init,
        **options,
    )
    if distributed.rank() == 0:
        print(f"samples of the posterior: {posterior.metadata['sampled_accuracy']:.1f} % of the training images right")
    return posterior


def forget(
    model: nn.Module, posterior: distruction.Posterior, data: ImageDataset, args: argparse.Namespace
) -> distruction.ForgetReport:
    """Forget the images, by a given lambda or by one that is found."""
    weight = "auto" if args.kl_weight is None else args.kl_weight
    return distruction.forget(model, posterior, batches(data, args), steps=args.steps, kl_weight=weight)


def evaluate(model: nn.Module, data: ImageDataset, args: argparse.Namespace) -> None:
    """Print the accuracy on the classes that were to be kept, D_r, and on ``args.forgotten``, D_f."""
    numbers = data.reader.class_to_idx
    if args.forgotten not in numbers:
        raise distruction.UsageError(f"class {args.forgotten!r} is unknown; the classes are {', '.join(numbers)}")
    logits, labels = predict(model, batches(data, args, shuffle=False))
    forgotten = labels == numbers[args.forgotten]
    kept = accuracy(logits[~forgotten], labels[~forgotten])
    print(f"D_r {kept:.1f} %, D_f {accuracy(logits[forgotten], labels[forgotten]):.1f} %")


def save(model: nn.Module, path: Path) -> None:
    """Write the weights as timm reads them; those of a sharded model are gathered by rank 0."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.rank() == 0:
        write_atomically(path, lambda name: save_file(state, name))
