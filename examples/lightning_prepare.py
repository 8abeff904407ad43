"""Learn a posterior of a ViT with Lightning: `BGD` in its training loop, on one device or several.

    pip install lightning
    python examples/lightning_prepare.py --devices 2 --out posterior.safetensors

Lightning calls ``optimizer.step(closure)``, so BGD draws the samples and puts the means back by itself: validation
and checkpoints see the means, and nothing of the module knows of it. With several devices Lightning's DDP averages
the gradients, and every rank draws the same samples.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distruction
from distruction import models
from distruction.data import Images, load


class Preparation(lightning.LightningModule):
    """A trained classifier whose posterior is learnt around its weights.

    Args:
        model: the trained model.
        data_per_step: training examples that one step stands for: their number, over a long enough run.
        lr: of the means; 0 keeps the trained weights, as the paper does.
    """

    def __init__(self, model: nn.Module, *, data_per_step: float, std_init: float = 0.1, lr: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self._options = {"data_per_step": data_per_step, "std_init": std_init, "lr": lr, "learn_mean": lr > 0}

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The mean loss of a batch at the sampled weights."""
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs), targets)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Accuracy of the means."""
        inputs, targets = batch
        accuracy = (self.model(inputs).argmax(dim=-1) == targets).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> distruction.BGD:
        """BGD over the model's parameters, by their names."""
        return distruction.BGD(self.model.named_parameters(), mc_samples=2, **self._options)

    def on_train_start(self) -> None:
        """Neither dropout nor changes of running statistics: the posterior is of the model as it predicts."""
        self.model.eval()


def loaders(train: Images, test: Images) -> tuple[Any, Any]:
    """Lightning adds a distributed sampler to these where there are several devices."""
    return tuple(
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*data[range(len(data))]), batch_size=64, shuffle=data is train
        )
        for data in (train, test)
    )


def prepare(model: nn.Module, out: Path, *, steps: int, devices: int = 1, accelerator: str = "auto") -> None:
    """Learn the posterior of ``model`` on the digits and write it to ``out``."""
    train, test = load("digits")
    module = Preparation(model, data_per_step=len(train))
    trainer = lightning.Trainer(
        max_steps=steps,
        devices=devices,
        accelerator=accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, *loaders(train, test))
    posterior = trainer.optimizers[0].posterior()
    if trainer.is_global_zero:
        posterior.save(out)


def main() -> None:
    """Train a small ViT, or take one from ``distruction train``, and prepare it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="model file written by `distruction train`; default: random weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    if arguments.model is None:
        torch.manual_seed(0)
        model = models.create("vit-micro", num_classes=10, in_chans=1, img_size=8)
    else:
        model, _ = models.load(arguments.model)
    prepare(model, arguments.out, steps=arguments.steps, devices=arguments.devices, accelerator=arguments.accelerator)


if __name__ == "__main__":
    main()
