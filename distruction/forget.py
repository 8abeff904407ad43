"""Forgetting with the forget set alone (paper, section 3.2)."""

import os
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import distributed, objectives
from .errors import UsageError
from .loop import FORGET_SET, Batches, Callback, Checkpoint, Step, cosine, run
from .modules import described
from .optim import BGD
from .posterior import Posterior, learnable


@dataclass(frozen=True)
class ForgetReport:
    """What forgetting did.

    Attributes:
        posterior: q, the posterior of the unlearned model; its means are in the model.
        history: one `distruction.Step` per step: loss, KL(q || p), forget accuracy of the samples.
        seconds: wall time of the unlearning alone, of this process.
    """

    posterior: Posterior
    history: list[Step]
    seconds: float


def forget(
    model: nn.Module,
    posterior: Posterior,
    loader: Batches,
    *,
    objective: str | objectives.Objective = "uniform-others",
    steps: int = 150,
    kl_weight: float = 0.1,
    data_per_step: float = 100.0,
    lr: float = 1.0,
    mc_samples: int = 2,
    seed: int = 0,
    backend: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    checkpoint_steps: int | None = None,
    keep_checkpoint: bool = False,
    release_gradients: bool = False,
    offload_prior: bool = False,
    callback: Callback | None = None,
    progress: bool = True,
) -> ForgetReport:
    """Make the model forget: from q = p minimise (1 - lambda) E_q[U] + lambda KL(q || p) by BGD.

    Args:
        model: the model that ``posterior`` was prepared for, holding its means. It runs in eval mode and ends
            holding the means of q.
        posterior: p, from `prepare`.
        loader: (inputs, targets) batches of the forget set, repeated as often as needed. No other data is read.
        objective: U, a name in `distruction.objectives.REGISTRY` or a callable (logits, targets) -> mean loss.
        steps: BGD updates.
        kl_weight: lambda in [0, 1]: larger keeps more of the model and forgets less.
        data_per_step: weight of the mean of U, in data points (see `BGD`).
        lr: step size of the mean at the start; decays to 0 along a cosine.
        mc_samples: forward and backward passes per update; even numbers use antithetic pairs.
        seed: of the draws and of the batches' order.
        backend: see `distruction.ops`.
        checkpoint, checkpoint_seconds, checkpoint_steps, keep_checkpoint, release_gradients, callback, progress: see
            `distruction.prepare`.
        offload_prior: leave p where it is, such as in the CPU's memory (`Posterior.pin_memory` makes it faster), and
            fetch it piece by piece in each step, instead of moving it to the model's device.

    Raises:
        UsageError: an argument is out of range, the forget set is empty or outside the model's labels.
        PosteriorError: the posterior belongs to another model or to other weights.
        NonFiniteError: the loss became NaN or infinite; the model holds the last good means.
    """
    distributed.start()
    if not 0 <= kl_weight <= 1:
        raise UsageError(f"kl_weight (lambda) must be in [0, 1], not {kl_weight}")
    unlearn = objectives.resolve(objective, model, posterior)
    dataset = getattr(loader, "dataset", None)
    if dataset is not None and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise UsageError("the forget set is empty, so there is nothing to forget")
    settings = {
        "objective": objectives.name_of(objective),
        "steps": steps,
        "kl_weight": kl_weight,
        "data_per_step": data_per_step,
        "lr": lr,
        "mc_samples": mc_samples,
        "seed": seed,
    }
    run_of: dict[str, Any] = settings
    if checkpoint is not None:
        # Of an object the result has the name; a checkpoint is also of its parameters.
        run_of = {**settings, "objective": described(objective), "prior": posterior.fingerprint()}
    point = Checkpoint(checkpoint, run_of, checkpoint_seconds, checkpoint_steps, keep_checkpoint)
    posterior.check(model, same_weights=point.load(model) is None)
    prior = posterior if offload_prior else posterior.like(model)

    def make_optimizer(resumed: Posterior | None) -> BGD:
        return BGD(
            learnable(model).items(),
            lr=lr,
            std_init=prior if resumed is None else resumed,
            data_per_step=data_per_step,
            mc_samples=mc_samples,
            prior=prior,
            kl_weight=kl_weight,
            max_std=prior.largest_std(),
            seed=seed,
            backend=backend,
            release_gradients=release_gradients,
        )

    def schedule(optimizer: BGD, history: list[Step]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(len(history), steps)

    needs_inputs = getattr(unlearn, "needs_inputs", False)

    def loss_fn(logits: Any, targets: Any, inputs: Any) -> Any:
        return unlearn(logits, targets, inputs) if needs_inputs else unlearn(logits, targets)

    start = time.perf_counter()
    optimizer, history = run(
        model,
        loader,
        loss_fn,
        make_optimizer,
        steps=steps,
        seed=seed,
        checkpoint=point,
        schedule=schedule,
        callback=callback,
        progress=progress,
        role=FORGET_SET,
        needs_inputs=needs_inputs,
    )
    seconds = time.perf_counter() - start
    result = optimizer.posterior(copy=False)
    result.metadata = {"method": "distruction", **settings, "steps_done": len(history), "kl": history[-1].kl}
    point.remove()
    return ForgetReport(result, history, seconds)
