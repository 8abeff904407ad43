"""The loop that `prepare` and `forget` share: seeded batches, progress, checkpoints, and weights that end as means.

Under ``torchrun`` every rank runs it. A step's batch is spread over the ranks, and the loss is that of the whole
batch: each rank computes the logits of its rows, and all of them the loss from all logits, so that the gradients of
the ranks add up to the gradient of one process on the same batch, however unevenly it was split.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .errors import NonFiniteError, PosteriorError, RankError, UsageError
from .files import check_writable, remove_leftovers
from .optim import BGD
from .posterior import Posterior, learnable
from .sharding import groups_of, is_sharded, largest, layout, local, reshard

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
    batch is handed out, which fixes what the model draws (dropout, random labels). A distributed sampler is told the
    epoch.

    Raises:
        UsageError: the loader is empty.
    """
    step = 0
    epoch = 0
    while step < stop:
        torch.manual_seed(seed_of(seed, 0, epoch))
        for sampler in _samplers(loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
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
        seconds: time after which it is written again.
        steps: steps after which it is written again; ``None``: time alone decides.
        keep: leave the file at the end.
    """

    path: str | os.PathLike[str] | None
    settings: dict[str, Any]
    seconds: float
    steps: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"checkpoint_steps must be >= 1, not {self.steps}")

    def load(self, model: nn.Module) -> tuple[Posterior, dict[str, Any]] | None:
        """The posterior and progress to resume from, or ``None`` to start from the beginning."""
        there = self.path is not None and Path(self.path).is_file()
        if not distributed.agree(there, next(model.parameters()).device):
            raise UsageError(f"only some ranks see the checkpoint {self.path}; put it where all of them can read it")
        if self.path is None:
            return None
        if distributed.rank() == 0:
            check_writable(self.path, 8 * sum(p.numel() for p in learnable(model).values()))
            remove_leftovers(self.path)
        if not there:
            return None
        try:
            posterior = Posterior.load(self.path, model=model)
        except PosteriorError as error:
            raise PosteriorError(f"{error}; or, to start from the beginning, delete this checkpoint") from error
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
        posterior = optimizer.posterior(copy=False)
        draw = optimizer.state_dict()["param_groups"][0]["draw"]
        posterior.metadata["checkpoint"] = {
            "settings": self.settings,
            "draw": draw,
            "history": [asdict(s) for s in history],
        }
        assert self.path is not None
        posterior.save(self.path)

    def due(self, steps: int, seconds: float) -> bool:
        """Whether to write it, so many steps and seconds after the last time."""
        return seconds >= self.seconds or (self.steps is not None and steps >= self.steps)

    def remove(self) -> None:
        """Delete the file, unless it is to be kept: the run is done."""
        if self.path is not None and not self.keep and distributed.rank() == 0:
            Path(self.path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Batch:
    """One step's batch, spread over the ranks.

    Attributes:
        inputs: rows of this rank for the forward pass; a stand-in row where ``count`` is 0.
        count: how many of them are of the batch.
        start: where they stand in the whole batch.
        targets: (batch,) of the whole batch.
        whole_inputs: of the whole batch; this rank's where nobody needs them all.
    """

    inputs: Tensor
    count: int
    start: int
    targets: Tensor
    whole_inputs: Tensor

    def whole(self, logits: Tensor) -> Tensor:
        """The logits of the whole batch from each rank's."""
        return distributed.gather_rows(logits[: self.count], self.start, len(self.targets))


class Batching:
    """Makes a `Batch` of what the loader gives: a global batch on each rank, or each rank's own part of one.

    A loader with a distributed sampler (``torch.utils.data.DistributedSampler``, timm's, accelerate's) gives each rank
    a part, and the parts together are the batch; any other gives every rank the whole batch, which is then split.
    """

    def __init__(self, loader: Batches, device: torch.device, *, needs_inputs: bool) -> None:
        self._in_parts = any(
            getattr(s, name, 1) > 1 for s in _samplers(loader) for name in ("num_replicas", "num_processes")
        )
        self._device = device
        self._needs_inputs = needs_inputs
        self._checked = distributed.size() == 1

    def __call__(self, batch: Any) -> Batch:
        """The batch, on the model's device.

        Raises:
            UsageError: not labelled, or the ranks' loaders give different batches without a distributed sampler.
        """
        inputs, targets = _labelled(batch, self._device)
        rank, size = distributed.rank(), distributed.size()
        if size > 1 and self._in_parts:
            return self._from_parts(inputs, targets)
        if not self._checked:
            digest = hashlib.sha256(targets.cpu().numpy().tobytes()).digest()
            if not distributed.agree(int.from_bytes(digest[:7], "big"), self._device):
                raise UsageError(
                    "the ranks' loaders give different batches: give every rank the same loader, whose batches are "
                    "then split between the ranks, or one with torch.utils.data.DistributedSampler"
                )
            self._checked = True
        start, stop = (i * len(targets) // size for i in (rank, rank + 1))
        own = inputs[start:stop] if stop > start else inputs[:1]
        return Batch(own, stop - start, start, targets, inputs)

    def _from_parts(self, inputs: Tensor, targets: Tensor) -> Batch:
        counts = torch.zeros(distributed.size(), dtype=torch.int64, device=self._device)
        counts[distributed.rank()] = len(targets)
        distributed.all_reduce_([counts])
        start, total = int(counts[: distributed.rank()].sum()), int(counts.sum())
        whole_inputs = distributed.gather_rows(inputs, start, total) if self._needs_inputs else inputs
        return Batch(inputs, len(targets), start, distributed.gather_rows(targets, start, total), whole_inputs)


class Gradients:
    """Makes each rank's gradients those of the whole batch: by the model's wrapper, or by an all-reduce.

    Attributes:
        sharded: whether parameters are sharded over the ranks.

    Raises:
        UsageError: the model is sharded otherwise than by ``fully_shard`` over all ranks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._params = learnable(model)
        params = list(self._params.values())
        sharded = [p for p in params if is_sharded(p)]
        wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
        for p in sharded:
            mesh, placements = layout(p)
            if mesh.size() != distributed.size() or sum(not place.is_replicate() for place in placements) != 1:
                raise UsageError(
                    f"a parameter is placed as {tuple(placements)} on {mesh.size()} of {distributed.size()} ranks; "
                    "prepare and forget know data parallel models alone (DistributedDataParallel, fully_shard over "
                    "all ranks); for others use BGD in a loop of your own"
                )
        self.sharded = bool(sharded)
        # Both wrappers average over the ranks where a sum is due.
        self._scale = distributed.size() if sharded or wrapped else 1
        self._ours = [] if wrapped or distributed.size() == 1 else [p for p in params if not is_sharded(p)]

    def backward(self, loss: Tensor) -> None:
        """Backward from the loss of the whole batch."""
        (loss * self._scale if self._scale > 1 else loss).backward()
        grads = [p.grad for p in self._ours if p.grad is not None]
        distributed.all_reduce_(grads)
        if self._scale > 1 and grads:
            torch._foreach_div_(grads, self._scale)

    @torch.no_grad()
    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient is NaN or infinite, on any rank."""
        held = {n: local(p.grad) for n, p in self._params.items() if p.grad is not None}
        flags = torch.zeros(len(held), dtype=torch.int32, device=next(iter(self._params.values())).device)
        filled = [i for i, g in enumerate(held.values()) if g.numel()]
        if filled:
            # One read of the gradients in a few launches; a maximum keeps NaN, and needs an element.
            norms = torch._foreach_norm([g for g in held.values() if g.numel()], math.inf)
            flags[filled] = (~torch.stack(norms).isfinite()).int()
        largest(flags, groups_of(self._params.values()))
        return [name for name, flag in zip(held, flags.tolist(), strict=True) if flag]


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
    needs_inputs: bool = False,
) -> tuple[BGD, list[Step]]:
    """Take ``steps`` BGD steps, resuming from the checkpoint where there is one.

    Args:
        loss_fn: ``(logits, targets, inputs) -> mean loss`` over the whole batch.
        make_optimizer: makes the optimizer, starting from a checkpoint's posterior when given one.
        schedule: sets the optimizer's options before each step from the history so far.
        needs_inputs: ``loss_fn`` uses the inputs.

    Returns:
        The optimizer, in eval mode, and the history. The model holds the means, also when an exception leaves here.

    Raises:
        RankError: another rank failed or was lost.
    """
    if steps < 1:
        raise UsageError(f"steps must be >= 1, not {steps}")
    resumed = checkpoint.load(model)
    optimizer = make_optimizer(resumed[0] if resumed else None)
    history = [Step(**s) for s in resumed[1]["history"]] if resumed else []
    device = next(model.parameters()).device
    if not distributed.agree(len(history), device):
        raise UsageError(f"the ranks see different checkpoints at {checkpoint.path}; put it on a shared file system")
    if resumed:
        for group in optimizer.param_groups:
            group["draw"] = resumed[1]["draw"]
    gradients = Gradients(model)
    batching = Batching(loader, device, needs_inputs=needs_inputs)
    reshard(model)
    saved, saved_at = time.monotonic(), len(history)
    # Here, so that `import distruction` and its optimizer need PyTorch, NumPy and safetensors alone.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not progress or distributed.rank() > 0
    with deterministic(model), Progress(*columns, disable=hidden, transient=True) as bar:
        task = bar.add_task(title, total=steps, completed=len(history))
        try:
            for loaded in seeded_batches(loader, seed=seed, start=len(history), stop=steps):
                batch = batching(loaded)
                schedule(optimizer, history)
                measured: list[tuple[Tensor, Tensor]] = []

                def closure(batch: Batch = batch, measured: list[tuple[Tensor, Tensor]] = measured) -> Tensor:
                    optimizer.zero_grad(set_to_none=True)
                    # An autocast around the whole run keeps its copies of the weights: those of the last sample.
                    torch.clear_autocast_cache()
                    logits = batch.whole(logits_of(model(batch.inputs)))
                    if measured == [] and not history:
                        _check_targets(logits, batch.targets)
                    loss = loss_fn(logits, batch.targets, batch.whole_inputs)
                    if not torch.isfinite(loss):
                        raise NonFiniteError(
                            f"the loss is {loss.item()} at step {len(history) + 1}; the weights are the last good "
                            "means. Lower lr, data_per_step or std_init, or look for the cause in the data"
                        )
                    gradients.backward(loss)
                    if names := gradients.nonfinite():
                        raise NonFiniteError(
                            f"the gradient of {', '.join(names[:5])} is NaN or infinite at step {len(history) + 1}; "
                            "the weights are the last good means. Lower lr, data_per_step or std_init, or look for "
                            "the cause in the data"
                        )
                    measured.append((loss.detach(), (logits.argmax(dim=-1) == batch.targets).float().mean()))
                    return loss

                optimizer.step(closure)
                group = optimizer.param_groups[0]
                kl = optimizer.kl
                history.append(
                    Step(
                        step=len(history) + 1,
                        steps=steps,
                        loss=torch.stack([m[0] for m in measured]).mean().item(),
                        accuracy=100.0 * torch.stack([m[1] for m in measured]).mean().item(),
                        kl=0.0 if kl is None else kl.item(),
                        kl_weight=float(group["kl_weight"]),
                    )
                )
                if callback is not None:
                    callback(history[-1])
                bar.update(task, completed=len(history), description=f"{title} loss {history[-1].loss:.3f}")
                if checkpoint.path is not None and len(history) < steps:
                    due = distributed.rank() == 0 and checkpoint.due(len(history) - saved_at, time.monotonic() - saved)
                    # Shards are gathered by all ranks together; else rank 0 needs nobody.
                    if distributed.of_first_rank(due, device) if gradients.sharded else due:
                        checkpoint.save(optimizer, history)
                        saved, saved_at = time.monotonic(), len(history)
        except BaseException as error:
            optimizer.zero_grad(set_to_none=True)
            # Without the check, which would wait for ranks that may be gone.
            optimizer.eval(check=False)
            if distributed.is_lost(error):
                raise RankError(
                    f"another rank failed or cannot be reached at step {len(history) + 1} (its own message says why): "
                    f"{error}. Start all ranks again"
                    + ("" if checkpoint.path is None else f"; they resume from {checkpoint.path}")
                ) from error
            raise
        optimizer.zero_grad(set_to_none=True)
        optimizer.eval()
        torch.clear_autocast_cache()
    return optimizer, history


def cosine(step: int, steps: int) -> float:
    """Cosine decay from 1 at step 0 towards 0 at step ``steps``."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def rising(steps: int) -> list[float]:
    """Shares, with sum 1, that rise geometrically by 1000 over the first 70 % of ``steps`` and then stay.

    With equal shares the first steps are long while the stds are wide, and BGD is a chaotic map: rounding grows until
    two backends' stds have no digit in common. With rising ones it grows little where a well trained model gets
    1000 steps or more.
    """
    weights = [1000.0 ** min(0.0, step / (0.7 * steps) - 1.0) for step in range(steps)]
    total = math.fsum(weights)
    return [w / total for w in weights]


def _samplers(loader: Any) -> Iterator[Any]:
    """The loader's samplers and those inside of them."""
    for name in ("sampler", "batch_sampler"):
        if (inner := getattr(loader, name, None)) is not None:
            yield inner
            yield from _samplers(inner)


def logits_of(output: Any) -> Tensor:
    """The logits in what a classifier gives: itself, or its ``logits``, as Hugging Face's models name them.

    Raises:
        UsageError: neither is a tensor.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"the model gives a {type(output).__name__}, neither logits nor an output with .logits; put it into a "
            "module whose forward returns its logits"
        )
    return logits


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
