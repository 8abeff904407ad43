"""Image classifiers of Hugging Face: folders that ``save_pretrained`` wrote."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.inputs import Called
from ..errors import UsageError
from ..extras import needed
from ..report import folder as whole_folder
from .base import SERVING, Model

with needed("vision"):
    from PIL import Image


def is_folder(folder: Path) -> bool:
    """Whether it holds a model's config."""
    return (folder / "config.json").is_file()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of a second that reading and writing weights takes."""
    with needed("language", "a Hugging Face folder"):
        from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def open_folder(folder: Path, *, device: str | torch.device = "cpu", weights: bool = True) -> Model:
    """The model, its labels and its image processor; nothing is fetched.

    Raises:
        MissingPackage: transformers is not installed.
        UsageError: the folder holds no image classifier with its processor.
    """
    with needed("language", f"{folder}, a folder of Hugging Face's,"):
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
    try:
        processor: Any = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
        if weights:
            with _quiet():
                network: Any = AutoModelForImageClassification.from_pretrained(str(folder), local_files_only=True)
            network.to(device)
        else:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
            with torch.device("meta"):
                network = AutoModelForImageClassification.from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(f"{folder} cannot be read as an image classifier with its processor: {reason}") from error
    names = network.config.id2label
    channels = 1 if getattr(network.config, "num_channels", 3) == 1 else 3

    def inputs(image: Image.Image) -> Tensor:
        found: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return found

    def write(network: nn.Module, path: Path, facts: Mapping[str, Any]) -> None:
        with _quiet(), whole_folder(path, overwrite=True) as draft:
            network.save_pretrained(str(draft))  # type: ignore[operator]  # transformers is not followed
            processor.save_pretrained(str(draft))
            (draft / "distruction.json").write_text(json.dumps({SERVING: facts}, indent=2) + "\n")

    shape = tuple(inputs(Image.new("L" if channels == 1 else "RGB", (64, 64))).shape)
    # Of its entries only those that say what is done with the pixels: others name classes and versions.
    told = {
        k: v
        for k, v in processor.to_dict().items()
        if k.startswith(("do_", "size", "crop", "resample", "rescale", "image_"))
    }
    return Model(
        name=str(folder),
        network=network,
        classes=tuple(names[label] for label in sorted(names)),
        inputs=Called(inputs, channels, {"kind": "transformers", **json.loads(json.dumps(told, default=str))}),
        input_shape=(shape[0], shape[1], shape[2]),
        write=write,
        origin=str(folder),
        folder=True,
    )
