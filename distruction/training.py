"""The loop that `prepare` and `forget` share: seeded batches, progress, checkpoints, and weights that end as means."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .errors import NonFiniteError, UsageError
from .optimizer import BGD
from .posterior import Posterior

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """What a callback learns of one step.

    Attributes:
        step: steps done, from 1 to ``steps``.
        steps: steps of the whole run.
        loss: mean loss over the batch, averaged over the Monte Carlo samples; in `forget`, of the objective alone.
        accuracy: percentage of the batch whose label the sampled models still predict.
        kl: KL(q || p) in nats after the step; 0 while preparing.
        kl_weight: lambda in force; 0 while preparing.
    """

    step: int
    steps: int
    loss: float
    accuracy: float
    kl: float
    kl_weight: float


Callback = Callable[[Step], None]


def seed_of(*parts: int) -> int:
    """A 63-bit seed that differs for every tuple of small non-negative integers."""
    value = 0
    for part in parts:
        value = (value * 0x9E3779B97F4A7C15 + part + 1) % 2**63
    return value


def seeded_batches(loader: Batches, *, seed: int, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches ``start .. stop`` of an endless repetition of ``loader``, the same ones however often a run resumed.

    PyTorch's global generator is seeded at each epoch, which fixes a shuffling loader's order, and again before each
    batch is handed out, which fixes what the model draws (dropout, random labels).

    Raises:
        UsageError: the loader is empty.
    """
    step = 0
    epoch = 0
    while step < stop:
        torch.manual_seed(seed_of(seed, 0, epoch))
        empty = True
        for batch in loader:
            empty = False
            if step >= stop:
                return
            if step >= start:
                torch.manual_seed(seed_of(seed, 1, step))
                yield batch
            step += 1
        if empty:
            raise UsageError("the data loader gave no batch; the data set is empty")
        epoch += 1


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, frozen BatchNorm statistics) and a private global generator; both restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands: a posterior file whose metadata says how far it is and with what settings.

    Attributes:
        path: the file, or ``None`` for no checkpoints.
        settings: JSON-able; a checkpoint of other settings is refused.
        seconds: least time between two writes.
    """

    path: str | os.PathLike[str] | None
    settings: dict[str, Any]
    seconds: float

    def load(self, model: nn.Module) -> tuple[Posterior, dict[str, Any]] | None:
        """The posterior and progress to resume from, or ``None`` to start from the beginning."""
        if self.path is None or not Path(self.path).is_file():
            return None
        posterior = Posterior.load(self.path, model=model)
        progress = posterior.metadata.get("checkpoint")
        if progress is None:
            raise UsageError(f"{self.path} is a finished posterior, not a checkpoint; choose another checkpoint path")
        found = progress["settings"]
        if found != self.settings:
            keys = sorted(k for k in {*found, *self.settings} if found.get(k) != self.settings.get(k))
            changes = ", ".join(f"{k}: {found.get(k)} there, {self.settings.get(k)} here" for k in keys)
            raise UsageError(
                f"checkpoint {self.path} is of another run ({changes}); delete it or use the same settings"
            )
        return posterior, progress

    def save(self, optimizer: BGD, history: list[Step]) -> None:
        """Write the optimizer's posterior and the history atomically."""
        posterior = optimizer.posterior()
        draw = optimizer.state_dict()["param_groups"][0]["draw"]
        posterior.metadata["checkpoint"] = {
            "settings": self.settings,
            "draw": draw,
            "history": [asdict(s) for s in history],
        }
        assert self.path is not None
        posterior.save(self.path)

    def remove(self) -> None:
        """Delete the file: the run is done."""
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)


def run(
    model: nn.Module,
    loader: Batches,
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    make_optimizer: Callable[[Posterior | None], BGD],
    *,
    steps: int,
    seed: int,
    checkpoint: Checkpoint,
    schedule: Callable[[BGD, list[Step]], None],
    callback: Callback | None,
    progress: bool,
    title: str,
) -> tuple[BGD, list[Step]]:
    """Take ``steps`` BGD steps, resuming from the checkpoint where there is one.

    Args:
        loss_fn: ``(logits, targets, inputs) -> mean loss``.
        make_optimizer: makes the optimizer, starting from a checkpoint's posterior when given one.
        schedule: sets the optimizer's options before each step from the history so far.

    Returns:
        The optimizer, in eval mode, and the history. The model holds the means, also when an exception leaves here.
    """
    if steps < 1:
        raise UsageError(f"steps must be >= 1, not {steps}")
    resumed = checkpoint.load(model)
    optimizer = make_optimizer(resumed[0] if resumed else None)
    history = [Step(**s) for s in resumed[1]["history"]] if resumed else []
    if resumed:
        for group in optimizer.param_groups:
            group["draw"] = resumed[1]["draw"]
    device = next(model.parameters()).device
    saved = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with deterministic(model), Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task(title, total=steps, completed=len(history))
        try:
            for batch in seeded_batches(loader, seed=seed, start=len(history), stop=steps):
                inputs, targets = _labelled(batch, device)
                schedule(optimizer, history)
                measured: list[tuple[Tensor, Tensor]] = []

                def closure(
                    inputs: Tensor = inputs, targets: Tensor = targets, measured: list[tuple[Tensor, Tensor]] = measured
                ) -> Tensor:
                    optimizer.zero_grad(set_to_none=True)
                    logits = model(inputs)
                    if measured == [] and not history:
                        _check_targets(logits, targets)
                    loss = loss_fn(logits, targets, inputs)
                    if not torch.isfinite(loss):
                        raise NonFiniteError(
                            f"the loss is {loss.item()} at step {len(history) + 1}; the weights are the last good "
                            "means. Lower lr, data_per_step or std_init, or look for the cause in the data"
                        )
                    loss.backward()
                    measured.append((loss.detach(), (logits.argmax(dim=-1) == targets).float().mean()))
                    return loss

                optimizer.step(closure)
                group = optimizer.param_groups[0]
                history.append(
                    Step(
                        step=len(history) + 1,
                        steps=steps,
                        loss=torch.stack([m[0] for m in measured]).mean().item(),
                        accuracy=100.0 * torch.stack([m[1] for m in measured]).mean().item(),
                        kl=0.0 if optimizer.kl is None else optimizer.kl.item(),
                        kl_weight=float(group["kl_weight"]),
                    )
                )
                if callback is not None:
                    callback(history[-1])
                bar.update(task, completed=len(history), description=f"{title} loss {history[-1].loss:.3f}")
                if (
                    checkpoint.path is not None
                    and len(history) < steps
                    and time.monotonic() - saved >= checkpoint.seconds
                ):
                    checkpoint.save(optimizer, history)
                    saved = time.monotonic()
        finally:
            optimizer.zero_grad(set_to_none=True)
            optimizer.eval()
    return optimizer, history


def cosine(step: int, steps: int) -> float:
    """Cosine decay from 1 at step 0 towards 0 at step ``steps``."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _labelled(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise UsageError("the loader must give (inputs, targets) pairs of tensors")
    inputs, targets = batch
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    classes = logits.shape[-1]
    if targets.dtype != torch.int64 or targets.ndim != 1:
        raise UsageError(f"targets must be a vector of int64 class numbers, not {targets.dtype} {tuple(targets.shape)}")
    low, high = targets.min().item(), targets.max().item()
    if low < 0 or high >= classes:
        raise UsageError(
            f"the labels run from {low} to {high}, but the model has {classes} classes (0 to {classes - 1}); "
            "the forget set is not part of its label space"
        )
