"""Preparation: learn, while the data is there, how precisely each weight must be known (paper, section 3.1)."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .errors import UsageError
from .modules import require_suitable
from .optimizer import BGD
from .posterior import Posterior, fingerprint, learnable
from .training import Batches, Callback, Checkpoint, Step, cosine, rising, run


def prepare(
    model: nn.Module,
    loader: Batches,
    *,
    steps: int = 1000,
    std_init: float = 0.1,
    evidence: float | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    mc_samples: int = 2,
    learn_mean: bool = False,
    lr: float = 1.0,
    seed: int = 0,
    backend: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    checkpoint_steps: int | None = None,
    keep_checkpoint: bool = False,
    release_gradients: bool = False,
    callback: Callback | None = None,
    progress: bool = True,
) -> Posterior:
    """Learn the posterior of a trained model by Bayesian Gradient Descent: mean = the weights, std learned.

    BGD never stops gathering evidence: 1/std**2 = 1/std_init**2 + the curvature of ``evidence`` data points. So
    ``evidence`` says how much data the posterior stands for, in data points. The steps' shares of it rise
    (`distruction.training.rising`).

    Args:
        model: any classifier that gives logits or, as Hugging Face's do, an output with ``logits``. Only its parameters
            with ``requires_grad`` get a posterior. It runs in eval mode (no dropout, BatchNorm statistics untouched)
            and ends as it was.
        loader: (inputs, targets) batches of the whole training set, repeated as often as needed.
        steps: BGD updates.
        std_init: std to start from, and its cap; > 0.
        evidence: data points that the posterior gathers; ``None`` is steps * len(loader.dataset).
        loss_fn: (logits, targets) -> mean loss, a negative log-likelihood in nats.
        mc_samples: forward and backward passes per update; even numbers use antithetic pairs.
        learn_mean: let the means move too, with step size ``lr``; the paper keeps them.
        seed: of the draws and of the batches' order.
        backend: see `distruction.ops`.
        checkpoint: file to resume from and to write every ``checkpoint_seconds`` and, where given, every
            ``checkpoint_steps``. A run that was killed at any point and started again ends with the same bits.
        keep_checkpoint: leave the file at the end, for a caller that deletes it once the result is on the disk.
        release_gradients: see `BGD`: the same bits with less memory, on one rank.
        callback: called with a `distruction.training.Step` after each step.
        progress: show a progress bar.

    Returns:
        The posterior, on the model's device.

    Raises:
        UsageError: an argument is out of range, the loader is empty or not labelled.
        NonFiniteError: the loss became NaN or infinite; says at which step.
        PosteriorError: the checkpoint is damaged or of another model; it stays as it is.
        OSError: the checkpoint cannot be written; an earlier one stays as it is.
    """
    distributed.start()
    if not learnable(model):
        raise UsageError("the model has no parameter with requires_grad, so there is nothing to prepare")
    require_suitable(learnable(model))
    if evidence is None:
        size = _dataset_size(loader)
        evidence = float(steps) * size
    if not evidence > 0:
        raise UsageError(f"evidence must be > 0 data points, not {evidence}")
    weights = fingerprint(learnable(model))
    shares = rising(steps)
    settings: dict[str, Any] = {
        "steps": steps,
        "std_init": std_init,
        "evidence": evidence,
        # A checkpoint from before they rose must not be taken for one of these.
        "shares": "rising",
        "mc_samples": mc_samples,
        "learn_mean": learn_mean,
        "lr": lr,
        "seed": seed,
        "weights": weights,
    }

    def make_optimizer(resumed: Posterior | None) -> BGD:
        return BGD(
            learnable(model).items(),
            lr=lr,
            std_init=std_init if resumed is None else resumed,
            data_per_step=evidence,
            mc_samples=mc_samples,
            max_std=std_init,
            learn_mean=learn_mean,
            seed=seed,
            backend=backend,
            release_gradients=release_gradients,
        )

    def schedule(optimizer: BGD, history: list[Step]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(len(history), steps)
            group["data_per_step"] = evidence * shares[len(history)]

    point = Checkpoint(checkpoint, settings, checkpoint_seconds, checkpoint_steps, keep_checkpoint)
    optimizer, history = run(
        model,
        loader,
        lambda logits, targets, inputs: loss_fn(logits, targets),
        make_optimizer,
        steps=steps,
        seed=seed,
        checkpoint=point,
        schedule=schedule,
        callback=callback,
        progress=progress,
        title="prepare",
    )
    posterior = optimizer.posterior(copy=False)
    tail = history[-max(1, steps // 10) :]
    posterior.metadata = {
        "method": "bgd",
        **settings,
        "torch": torch.__version__.split("+")[0],
        "sampled_loss": sum(s.loss for s in tail) / len(tail),
        "sampled_accuracy": sum(s.accuracy for s in tail) / len(tail),
    }
    point.remove()
    return posterior


def _dataset_size(loader: Batches) -> int:
    dataset = getattr(loader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__"):
        raise UsageError("the loader's data set has no length: pass evidence= (data points, e.g. steps * 50_000)")
    if len(dataset) == 0:
        raise UsageError("the training set is empty, so there is nothing to prepare from")
    return len(dataset)
