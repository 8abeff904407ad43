"""Models by name, and their safetensors files."""

import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .extras import needed
from .files import load_facts, load_tensors, save_tensors

with needed("vision"):
    import timm
    from timm.layers import PatchEmbed
    from timm.models import load_state_dict
    from timm.models.vision_transformer import VisionTransformer

FORMAT = "distruction-model-1"


class ConvStem(nn.Module):
    """Tokens by three convolutions of stride 2, in place of a ViT's patches (Xiao et al., arXiv 2106.14881).

    Args:
        img_size, in_chans: of the images.
        embed_dim: of the tokens, one for each 8 x 8 pixels.
        unused: what timm's `VisionTransformer` says of its patches.
    """

    def __init__(self, *, img_size: int, in_chans: int, embed_dim: int, **unused: Any) -> None:
        super().__init__()
        self.num_patches = math.ceil(img_size / 8) ** 2
        widths = (in_chans, embed_dim // 2, embed_dim, embed_dim)
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, in_chans, side, side) to (batch, tokens, embed_dim)."""
        tokens: Tensor = self.layers(images).flatten(2).transpose(1, 2)
        return tokens


MICRO: dict[str, Any] = {"vit-micro": PatchEmbed, "vit-micro-conv": ConvStem}
"""The small models of this library by name, with what makes their tokens."""


def create(
    name: str, *, num_classes: int, in_chans: int, img_size: int, pretrained: str | os.PathLike[str] | None = None
) -> nn.Module:
    """A model as it is before training.

    Args:
        name: ``vit-micro`` (a ViT of 0.2 M parameters for images of 8 to 32 pixels: dimension 64, 4 blocks,
            patches of 4 pixels up to 16 and of a quarter of the side above), ``vit-micro-conv`` (the same with a
            convolutional stem, which learns sooner from few epochs), or any timm model.
        num_classes, in_chans, img_size: of the data.
        pretrained: file of a timm model's weights, or ``hub`` for the hub's cache; ``None`` is random weights. The
            head is always new where its size differs.

    Raises:
        UsageError: timm has no model of that name, or the pretrained weights cannot be had or are of another model.
    """
    if name in MICRO:
        if pretrained is not None:
            raise UsageError(f"{name} has no pretrained weights; name a timm model, such as vit_base_patch16_224")
        return VisionTransformer(
            img_size=img_size,
            patch_size=8 if name == "vit-micro-conv" else max(4, img_size // 4),
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=64,
            depth=4,
            num_heads=4,
            embed_layer=MICRO[name],
        )
    if not timm.is_model(name):
        raise UsageError(f"model {name!r} is unknown; choose {', '.join(MICRO)} or a timm model (timm.list_models())")
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    if pretrained is None:
        return _create(name, arguments)
    overlay = {} if pretrained == "hub" else {"file": str(pretrained)}
    if overlay and not Path(pretrained).is_file():
        raise UsageError(f"no pretrained weights at {pretrained}; save timm.create_model({name!r}, pretrained=True)'s")
    try:
        # First, so that nothing but tensors is ever unpickled. (timm's .npz files have names of their own.)
        named = overlay and not str(pretrained).endswith(".npz")
        found = set(load_state_dict(str(pretrained), weights_only=True)) if named else set()
        # timm leaves weights that the file lacks random, with a warning.
        model = _create(name, {**arguments, "pretrained": True, "pretrained_cfg_overlay": overlay})
    except (RuntimeError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"the pretrained weights of {name} from {pretrained} cannot be used: {reason}") from error
    cfg: Any = model.default_cfg
    head = {f"{cfg['classifier']}.{kind}" for kind in ("weight", "bias")}
    lacking = sorted(set(model.state_dict()) - head - found) if found else []
    if lacking:
        raise UsageError(
            f"{pretrained} cannot be used for {name}: it has no {', '.join(lacking[:3])}; is it of {name}?"
        )
    return model


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        # Convolutional networks take images of any size, and no argument for it.
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **{k: v for k, v in arguments.items() if k != "img_size"})


def resize_inputs(model: nn.Module, size: int) -> None:
    """Let ``model`` resize the images that it is given to ``size`` x ``size`` pixels (bicubic), on its own device."""

    def resize(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.interpolate(inputs[0], size=(size, size), mode="bicubic", antialias=True), *inputs[1:])

    model.register_forward_pre_hook(resize)


def save(model: nn.Module, path: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Write the state_dict and ``config`` as safetensors, atomically.

    Args:
        config: arguments of `create`; and ``resize``, true where the model is given images of another size, which
            `resize_inputs` brings to ``img_size``.
    """
    save_tensors(path, model.state_dict(), format=FORMAT, facts={"config": config})


def config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `create` that a file written by `save` holds, without its weights.

    Raises:
        UsageError: the file is not a model of this library.
    """
    try:
        found = load_facts(path, format=FORMAT)["config"]
        return {k: found[k] for k in ("name", "num_classes", "in_chans", "img_size")}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read as a model: {error}; train it again") from error


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
        if config.get("resize"):
            resize_inputs(model, config["img_size"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read as a model: {error}; train it again") from error
    return model.to(device), config
