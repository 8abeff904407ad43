"""Models by name, and their safetensors files."""

import json
import os
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .errors import UsageError
from .posterior import write_atomically

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
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
    header = {"format": FORMAT, "config": json.dumps(config)}
    write_atomically(path, lambda name: save_file(tensors, name, header))


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model written by `save`, and its config.

    Raises:
        UsageError: the file is missing, damaged or not a model of this library.
    """
    if not Path(path).is_file():
        raise UsageError(f"no model file at {path}; write one with `distruction train`")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise UsageError(f"{path} is no model file: format {header.get('format')!r}, expected {FORMAT!r}")
            config = json.loads(header["config"])
            state = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (not a dict)
        model = create(**{k: config[k] for k in ("name", "num_classes", "in_chans", "img_size")})
        model.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is damaged or no model file: {error}") from error
    return model.to(device), config
