"""Models that a Python function makes, named ``package.module:function``."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.inputs import Called, Inputs
from ..errors import UsageError
from ..extras import needed
from .base import Model, load_weights, read_state, write_state

with needed("vision"):
    from PIL import Image


def open_call(
    spec: str,
    *,
    weights: Path | None,
    classes: tuple[str, ...] | None,
    device: str | torch.device = "cpu",
    read: bool = True,
) -> Model:
    """What the function returns: a module with its weights, or a pair (module, transform of an image).

    The transform takes an RGB image of Pillow's and gives a (channels, height, width) tensor; one with an attribute
    ``channels`` of 1 is given grey images.

    Raises:
        UsageError: there is no such function, or it fails, or returns something else.
    """
    module, _, function = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"the model {spec} cannot be had: {error}") from error
    try:
        made: Any = found()
    except Exception as error:  # whatever the function does
        raise UsageError(f"the model {spec} cannot be made: {type(error).__name__}: {error}") from error
    network, transform = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"{spec}() returned a {type(network).__name__}: it must return a module, or (module, transform)"
        )
    facts = None
    if weights is not None and read:
        state, facts = read_state(weights)
        load_weights(network, state, str(weights))
    network.to(device)

    def write(network: nn.Module, path: Path, facts: Mapping[str, Any]) -> None:
        write_state(network, path, facts)

    inputs: Inputs | None = None
    shape = (3, 0, 0)
    if transform is not None:
        channels = getattr(transform, "channels", 3)
        inputs = Called(transform, channels, {"kind": "function", "name": spec})
        found = inputs(Image.new("L" if channels == 1 else "RGB", (64, 64)))
        if not isinstance(found, torch.Tensor) or found.ndim != 3:
            raise UsageError(f"the transform of {spec} must give a tensor (channels, height, width)")
        shape = (found.shape[0], found.shape[1], found.shape[2])
    own = getattr(network, "classes", None)
    model = Model(spec, network, classes or (None if own is None else tuple(own)), inputs, shape, write)
    model.agree_with(facts, str(weights))
    return model
