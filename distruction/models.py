"""Models by name, and their safetensors files."""

import os
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .errors import UsageError
from .files import load_tensors, save_tensors

FORMAT = "distruction-model-1"


def create(name: str, *, num_classes: int, in_chans: int, img_size: int) -> nn.Module:
    """A freshly initialised model.

    Args:
        name: ``vit-micro`` (a ViT of 0.2 M parameters for images of 8 to 32 pixels: dimension 64, 4 blocks,
            patches of 4 pixels up to 16 and of a quarter of the side above), or any timm model.
        num_classes, in_chans, img_size: of the data.

    Raises:
        UsageError: timm has no model of that name.
    """
    if name == "vit-micro":
        return VisionTransformer(
            img_size=img_size,
            patch_size=max(4, img_size // 4),
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=64,
            depth=4,
            num_heads=4,
        )
    if not timm.is_model(name):
        raise UsageError(f"model {name!r} is unknown; choose vit-micro or a timm model (timm.list_models())")
    return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, img_size=img_size)


def save(model: nn.Module, path: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Write the state_dict and the arguments of `create` (``config``) as safetensors, atomically."""
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    save_tensors(path, tensors, format=FORMAT, facts={"config": config})


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model written by `save`, and its config.

    Raises:
        UsageError: the file is missing, damaged or not a model of this library.
    """
    if not Path(path).is_file():
        raise UsageError(f"no model file at {path}; write one with `distruction train`")
    try:
        state, facts = load_tensors(path, format=FORMAT)
        config = facts["config"]
        model = create(**{k: config[k] for k in ("name", "num_classes", "in_chans", "img_size")})
        model.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read as a model: {error}; train it again") from error
    return model.to(device), config
