"""``distruction train``: training a model to unlearn from, or retraining."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .. import metrics, models, training
from ..data import detect, forget_split, load, loader
from ..data.inputs import Pixels
from .options import (
    MOST,
    BatchSize,
    DataRoot,
    Dataset,
    Device,
    Overwrite,
    Pretrained,
    Progress,
    Seed,
    SkipUnreadable,
    alone,
    check_root,
    device_of,
    output,
    positive,
)


def train(
    out: Annotated[Path, typer.Option(help="Model file to write.")],
    data: DataRoot = None,
    dataset: Dataset = None,
    model: Annotated[str, typer.Option(help="vit-micro, vit-micro-conv or a timm model.")] = "vit-micro",
    pretrained: Pretrained = None,
    img_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Input size of the model, to which images are resized; default: theirs."),
    ] = None,
    without_class: Annotated[
        list[str], typer.Option(help="Leave this class out: retraining, the gold standard; may be repeated.")
    ] = [],  # noqa: B006
    epochs: Annotated[int, typer.Option(min=1, max=MOST)] = 40,
    lr: Annotated[float, typer.Option(callback=positive, help="Peak learning rate of AdamW.")] = 2e-3,
    batch_size: BatchSize = 64,
    crop: Annotated[
        int, typer.Option(min=0, max=MOST, help="Augmentation: random shifts by up to this many pixels.")
    ] = 0,
    flip: Annotated[bool, typer.Option(help="Augmentation: random horizontal flips.")] = False,
    skip_unreadable: SkipUnreadable = False,
    seed: Seed = 0,
    device: Device = "auto",
    progress: Progress = True,
    overwrite: Overwrite = False,
) -> None:
    """Train a classifier, from scratch or from pretrained weights."""
    alone("train")
    output(out, overwrite)
    place = device_of(device)
    dataset = dataset or detect(data)
    check_root(dataset, data)
    parts = load(dataset, data, side=img_size, need_test=False, skip_unreadable=skip_unreadable)
    train_data, test_data = (part.to(place) for part in parts)
    side = train_data.images.shape[-1]
    config: dict[str, Any] = {
        "name": model,
        "num_classes": len(train_data.classes),
        "in_chans": train_data.images.shape[1],
        "img_size": img_size or side,
    }
    served = {"classes": list(train_data.classes), "images": Pixels.of(train_data).facts()}
    if without_class:
        _, train_data = forget_split(train_data, without_class)
    torch.manual_seed(seed)
    network = models.create(**config, pretrained=pretrained).to(place)
    if config["img_size"] != side:
        config["resize"] = True
        models.resize_inputs(network, config["img_size"])
    settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "crop": crop, "flip": flip}
    training.train(network, train_data, **settings, seed=seed, progress=progress)
    models.save(network, out, {**config, "data": dataset, **served})
    measured, name = (test_data, "test") if len(test_data) else (train_data, "training")
    accuracy = metrics.accuracy(*metrics.predict(network, loader(measured, batch_size=512)))
    Console().print(f"{out}: {accuracy:.1f} % on the {name} set")
