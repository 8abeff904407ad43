"""What jobs are made of: the data, its splits, and untrained models, by a job's facts."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models, scenarios
from ..data import Images, grouped, hold_out, load
from ..errors import UsageError
from ..seeds import seed_of
from .store import canonical, file_hash


@dataclass(frozen=True)
class Context:
    """Where and on what jobs run; nothing here changes a result.

    Attributes:
        store: folder of the results.
        data_root: folder of the data sets, or ``None`` for those that need none.
        pretrained: file of pretrained weights, ``hub`` for the hub's cache, or ``None``.
        device: as torch names it.
        backend: see `distruction.ops`.
        skip_unreadable: leave out image files that cannot be read; what is left is part of a job's facts.
        keep_models: keep the unlearned model of each cell.
        progress: show progress bars inside of a job.
    """

    store: Path
    data_root: Path | None = None
    pretrained: str | None = None
    device: str = "cpu"
    backend: str = "auto"
    skip_unreadable: bool = False
    keep_models: bool = False
    progress: bool = False


@functools.cache
def _data(name: str, root: Path | None, side: int | None, skip_unreadable: bool) -> tuple[Images, Images]:
    return load(name, root, side=side, skip_unreadable=skip_unreadable)


@functools.cache
def data_hash(name: str, root: Path | None, side: int | None, skip_unreadable: bool) -> str:
    """Of the images, labels and class names of both parts."""
    digest = hashlib.sha256()
    for part in _data(name, root, side, skip_unreadable):
        digest.update(canonical([list(part.images.shape), part.classes]).encode())
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.contiguous().numpy().data)
        if part.fine is not None:
            digest.update(canonical(part.fine_classes).encode())
            digest.update(part.fine.contiguous().numpy().data)
    return digest.hexdigest()


@functools.cache
def pretrained_hash(pretrained: str | None) -> str | None:
    """Of the file of pretrained weights."""
    if pretrained is None or pretrained == "hub":
        return pretrained
    if not Path(pretrained).is_file():
        raise UsageError(f"no pretrained weights at {pretrained}; pass a file, or hub for the hub's cache")
    return file_hash(pretrained)


def make_split(model: Mapping[str, Any], split: Mapping[str, Any], context: Context) -> scenarios.Split:
    """The scenario of these facts."""
    train, test = training_data(model, context)
    if split["scenario"] == "random":
        return scenarios.random(train, test, split["count"], model["seed"])
    if split["scenario"] == "sub-class":
        return scenarios.sub_class(train, test, split["target"])
    return scenarios.full_class(train, test, split["target"])


def network_of(facts: Mapping[str, Any], data: Images) -> dict[str, Any]:
    """The arguments of `models.create` for the data."""
    given = {k: v for k, v in facts["network"].items() if k != "plain_seed"}
    channels, side = data.images.shape[1], data.images.shape[-1]
    return {"img_size": side, **given, "num_classes": len(data.classes), "in_chans": channels}


def fresh(facts: Mapping[str, Any], context: Context) -> nn.Module:
    """An untrained model of these facts, the same each time."""
    train, _ = training_data(facts, context)
    plain = facts["network"].get("plain_seed", False)
    with torch.random.fork_rng():
        torch.manual_seed(facts["seed"] if plain else seed_of(facts["seed"], 3))
        side = train.images.shape[-1]
        network = network_of(facts, train)
        model = models.create(**network, pretrained=context.pretrained)
        if network["img_size"] != side:
            models.resize_inputs(model, network["img_size"])
    return model.to(context.device)


def training_data(facts: Mapping[str, Any], context: Context) -> tuple[Images, Images]:
    """Labelled as the model's head is, on its device."""
    side = facts["network"].get("img_size")
    parts = _data(facts["data"]["name"], context.data_root, side, context.skip_unreadable)
    if share := facts["data"].get("validation"):
        parts = hold_out(parts[0], share)
    if facts["groups"]:
        parts = grouped(parts[0], facts["groups"]), grouped(parts[1], facts["groups"])
    return parts[0].to(context.device), parts[1].to(context.device)
