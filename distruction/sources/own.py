"""Model files that `distruction train` wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..data.inputs import Pixels
from ..files import load_facts
from .base import Model


def holds(spec: str) -> bool:
    """Whether ``spec`` is such a file."""
    try:
        load_facts(spec, format=models.FORMAT)
    except ValueError:
        return False
    return Path(spec).is_file()


def open_file(spec: str, *, device: str | torch.device = "cpu", weights: bool = True) -> Model:
    """The model of the file."""
    if weights:
        network, config = models.load(spec, device=device)
    else:
        config = models.config(spec)
        with torch.device("meta"):
            network = models.create(**config)
    images = config.get("images")
    inputs = None
    if images is not None:
        inputs = Pixels(images["channels"], images["side"], tuple(images["mean"]), tuple(images["std"]))
    side = config["img_size"]

    def write(network: nn.Module, path: Path, facts: Mapping[str, Any]) -> None:
        models.save(network, path, config)

    return Model(
        name=spec,
        network=network,
        classes=tuple(config["classes"]) if "classes" in config else None,
        inputs=inputs,
        input_shape=(config["in_chans"], side, side),
        write=write,
        origin=config.get("data", ""),
        config=config,
    )
