"""The loop that `prepare` and `forget` share: seeded batches, progress, checkpoints, and weights that end as means.

Under ``torchrun`` every rank runs it. A step's batch is spread over the ranks, and the loss is that of the whole
batch: each rank computes the logits of its rows, and all of them the loss from all logits, so that the gradients of
the ranks add up to the gradient of one process on the same batch, however unevenly it was split.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import distributed
from ..errors import NonFiniteError, RankError, UsageError
from ..modules import deterministic, logits_of
from ..optimizer import BGD
from ..posterior import Posterior
from ..sharding import reshard
from .batches import Batch, Batches, Batching, seeded_batches
from .checkpoint import Checkpoint
from .ranks import Gradients
from .step import Callback, Step


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
