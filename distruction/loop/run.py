"""The loop that `prepare` and `forget` share: progress, checkpoints, and weights that end as means.

Under ``torchrun`` every rank runs it. A step's batch is spread over the ranks, and the loss is that of the whole
batch: each rank computes the logits of its rows, and all of them the loss from all logits, so that the gradients of
the ranks add up to the gradient of one process on the same batch, however unevenly it was split. Of a language model's
batch each rank computes the loss of its own tokens, and sums and counts are added up.

The host waits for the device once a step, for the step's figures; the labels' range and the loss are checked with
them. Gradients are not checked: the optimizer's kernels refuse an update that is not finite and say so.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..errors import NonFiniteError, RankError, UsageError
from ..modules import deterministic, logits_of, unwrapped
from ..optim import BGD
from ..posterior import Posterior
from ..progress import bar
from ..sharding import reshard
from .batches import Batch, Batches, Batching, Inputs, call, seeded_batches
from .checkpoint import Checkpoint
from .labels import Labels, answers_at_once, as_rows
from .loaders import Role, check_loader
from .ranks import Gradients
from .step import Callback, Controller, Step, Terminated, asks_to_stop
from .tokens import Sequences, require_causal

STEPS_BETWEEN_CHECKS = 10
"""After so many steps the host asks a device whether an update was refused; the CPU is asked in each."""


def run(
    model: nn.Module,
    loader: Batches,
    loss_fn: Callable[[Tensor, Tensor, Inputs], Tensor],
    make_optimizer: Callable[[Posterior | None], BGD],
    *,
    steps: int,
    seed: int,
    checkpoint: Checkpoint,
    schedule: Callable[[BGD, list[Step]], None],
    callback: Callback | None,
    progress: bool,
    role: Role,
    needs_inputs: bool = False,
    labels: bool | None = True,
    shown: Callable[[Tensor, Tensor], Tensor] | None = None,
    accuracy: Callable[[Tensor, Tensor], Tensor] | None = None,
    controller: Controller | None = None,
    before_passes: Callable[[Inputs], object] | None = None,
    after_forward: Callable[[Batch], object] | None = None,
    looks: int = 0,
) -> tuple[BGD, list[Step]]:
    """Take ``steps`` BGD steps, resuming from the checkpoint where there is one.

    Args:
        loss_fn: ``(logits, targets, inputs) -> mean loss`` over the whole batch.
        make_optimizer: makes the optimizer, starting from a checkpoint's posterior when given one.
        schedule: sets the optimizer's options before each step from the history so far.
        role: what the data is.
        needs_inputs: ``loss_fn`` uses the inputs.
        labels: the targets are class numbers, whose range is checked; ``None``: if they are a vector of integers.
        shown: ``(logits, targets) -> mean loss`` to report where it is not the one that is minimised.
        accuracy: ``(logits, targets) -> (batch,)`` in [0, 1], to report; ``None``: of class numbers, whether they are
            predicted.
        controller: steers the run; it is asked after ``schedule``.
        before_passes: called with each batch's inputs (of the whole batch where ``needs_inputs``) before the model's
            passes, whose activations a call of the same model in between could change.
        after_forward: called with each batch between the model's forward pass and ``loss_fn``.
        looks: in so many steps, the last ones, the accuracy of the batch is also found at the means.

    Returns:
        The optimizer, in eval mode, and the history. The model holds the means, also when an exception leaves here.

    Raises:
        RankError: another rank failed or was lost.
    """
    if steps < 1:
        raise UsageError(f"steps must be >= 1, not {steps}")
    check_loader(loader, role, steps)
    resumed = checkpoint.load(model)
    optimizer = make_optimizer(resumed[0] if resumed else None)
    history = [Step(**s) for s in resumed[1]["history"]] if resumed else []
    stop = len(history) if resumed and resumed[1].get("stopped") else steps
    if resumed and stop == len(history):
        resumed[0].mean_(model)  # no step will put the means in
    device = next(model.parameters()).device
    if not distributed.agree(len(history), device):
        raise UsageError(f"the ranks see different checkpoints at {checkpoint.path}; put it on a shared file system")
    if resumed:
        for group in optimizer.param_groups:
            group["draw"] = resumed[1]["draw"]
        if controller is not None:
            controller.load_state_dict(resumed[1]["controller"])
    gradients = Gradients(model)
    batching = Batching(loader, device, needs_inputs=needs_inputs, role=role)
    reshard(model)
    saved, saved_at = time.monotonic(), len(history)
    hidden = not progress or distributed.rank() > 0
    with deterministic(model), bar(role.title, steps, completed=len(history), hidden=hidden) as show:
        try:
            for loaded in seeded_batches(loader, seed=seed, start=len(history), stop=stop, role=role):
                batch = batching(loaded)
                schedule(optimizer, history)
                if controller is not None:
                    controller.before_step(optimizer, history)
                if before_passes is not None:
                    before_passes(batch.whole_inputs)
                sampled = Sampled(
                    model, batch, loss_fn, gradients, role, len(history) + 1, labels, shown, accuracy, after_forward
                )
                if len(history) >= steps - looks:
                    sampled.look()

                def closure(sampled: Sampled = sampled) -> Tensor:
                    if sampled.samples:
                        gradients.remember()
                    optimizer.zero_grad(set_to_none=True)
                    return sampled.backward()

                with _told_where(gradients, len(history) + 1, sampled):
                    optimizer.step(closure)
                    history.append(sampled.step(optimizer, steps))
                    if len(history) % STEPS_BETWEEN_CHECKS == 0 and not answers_at_once(device):
                        optimizer.raise_if_nonfinite()
                done = controller is not None and controller.after_step(optimizer, history)
                if controller is not None:
                    history[-1] = replace(history[-1], probability=getattr(controller, "value", None))
                    reshard(model)
                try:
                    done = (callback is not None and asks_to_stop(callback(history[-1]))) or done
                except Terminated:
                    if checkpoint.path is not None and distributed.rank() == 0 and not gradients.sharded:
                        checkpoint.save(optimizer, history, controller=controller)
                    raise
                show(len(history), f"{role.title} {history[-1]}")
                if checkpoint.path is not None and len(history) < steps:
                    due = distributed.rank() == 0 and checkpoint.due(len(history) - saved_at, time.monotonic() - saved)
                    # Shards are gathered by all ranks together; else rank 0 needs nobody.
                    if distributed.of_first_rank(due, device) if gradients.sharded else due:
                        with _told_where(gradients, len(history)):
                            checkpoint.save(optimizer, history, controller=controller)
                        saved, saved_at = time.monotonic(), len(history)
                # After the checkpoint, which is then there although another rank is lost.
                if distributed.on_any_rank(done, device):
                    if checkpoint.path is not None and (gradients.sharded or distributed.rank() == 0):
                        checkpoint.save(optimizer, history, stopped=True, controller=controller)
                    break
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
        with _told_where(gradients, len(history)):
            optimizer.eval()
        optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()
    return optimizer, history


class Sampled:
    """One step's forward and backward passes, one for each Monte Carlo sample, and their figures."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        loss_fn: Callable[[Tensor, Tensor, Inputs], Tensor],
        gradients: Gradients,
        role: Role,
        step: int,
        labels: bool | None,
        shown: Callable[[Tensor, Tensor], Tensor] | None,
        accuracy: Callable[[Tensor, Tensor], Tensor] | None,
        after_forward: Callable[[Batch], object] | None,
    ) -> None:
        self._after_forward = after_forward
        self._accuracy = accuracy or (None if labels is False else _predicted)
        self._model, self._batch, self._loss_fn, self._shown = model, batch, loss_fn, shown
        self._gradients = gradients
        self._role = role
        self._step = step
        if batch.sequences is not None:
            require_causal(model)
        if labels is None:
            labels = batch.targets.ndim == 1 and not batch.targets.dtype.is_floating_point
        self._labels = Labels(batch.targets, role, step) if labels and len(batch.targets) else None
        self._figures: list[Tensor] = []
        self._at_means: Tensor | None = None
        gradients.norms.clear()

    @property
    def samples(self) -> int:
        """How many have been taken."""
        return len(self._figures)

    def backward(self) -> Tensor:
        """The loss of the current sample, after its backward pass."""
        # An autocast around the whole run keeps its copies of the weights: those of the last sample.
        torch.clear_autocast_cache()
        batch = self._batch
        logits = batch.whole(self._rows_of(logits_of(call(self._model, batch.inputs))))
        if self._after_forward is not None:
            self._after_forward(batch)
        targets = batch.targets if self._labels is None else self._labels.within(logits)
        if batch.sequences is not None:
            return self._backward_of_tokens(batch.sequences, logits, targets)
        loss = self._loss_fn(logits, targets, batch.whole_inputs)
        self._check_mean(loss)
        if answers_at_once(loss.device) and not loss.isfinite():
            raise self._nonfinite(loss.item())
        self._gradients.backward(loss)
        with torch.no_grad():
            reported = loss.detach() if self._shown is None else self._shown(logits.detach(), targets)
            right = None if self._accuracy is None else self._accuracy(logits.detach(), targets)
            correct = reported.new_full((), math.nan, dtype=torch.float64) if right is None else right.double().mean()
            self._figures.append(torch.stack([t.double().reshape(()) for t in (reported, correct, loss)]))
        return loss

    @torch.no_grad()
    def look(self) -> None:
        """Find what part of the batch is predicted by the weights that the parameters hold."""
        torch.clear_autocast_cache()
        model, batch = unwrapped(self._model), self._batch
        reshard(model)
        logits = batch.whole(self._rows_of(logits_of(call(model, batch.inputs))))
        targets = batch.targets if self._labels is None else self._labels.within(logits)
        torch.clear_autocast_cache()
        reshard(model)
        if batch.sequences is not None:
            self._at_means = _share_predicted(batch.sequences, logits, targets)
            if distributed.size() > 1:
                distributed.all_reduce_([self._at_means])
        elif self._accuracy is not None and (right := self._accuracy(logits, targets)) is not None:
            self._at_means = right.double().mean()

    def _rows_of(self, logits: Tensor) -> Tensor:
        inputs = self._batch.inputs
        rows = len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))
        if logits.ndim == 0 or len(logits) != rows:
            raise UsageError(
                f"the model gives logits of shape {tuple(logits.shape)} for a batch of {rows}: their first dimension "
                "must be the batch"
            )
        return logits

    def _backward_of_tokens(self, here: Sequences, logits: Tensor, targets: Tensor) -> Tensor:
        """The same for a language model's batch; the loss is this rank's share of the whole batch's."""
        if len(targets) == 0:
            loss = logits.sum()  # of nothing: the pass is one that the other ranks of a sharded model wait for
            figures = loss.new_zeros(3, dtype=torch.float64)
        else:
            loss = self._loss_fn(logits, targets, here)
            self._check_mean(loss)
            loss = loss * here.share(getattr(self._loss_fn, "per_text", False))
            with torch.no_grad():
                shown = loss.detach() if self._shown is None else self._shown(logits.detach(), targets) * here.share()
                correct = _share_predicted(here, logits, targets)
                figures = torch.stack([t.detach().double().reshape(()) for t in (shown, correct, loss)])
        if distributed.size() > 1:
            distributed.all_reduce_([figures])
        if answers_at_once(figures.device) and not figures[-1].isfinite():
            raise self._nonfinite(figures[-1].item())
        self._gradients.backward(loss)
        self._figures.append(figures)
        return loss

    def step(self, optimizer: BGD, steps: int) -> Step:
        """What to tell of the step; waits for the device."""
        kl = optimizer.kl
        kl_weight: Any = optimizer.param_groups[0]["kl_weight"]
        means = torch.stack(self._figures).mean(dim=0)
        # All that the host wants to know goes there at once.
        told = [] if kl is None else [kl]
        told += [kl_weight] if isinstance(kl_weight, Tensor) else []
        told += [] if self._at_means is None else [self._at_means]
        told += self._labels.found() if self._labels is not None else []
        loss, accuracy, minimised, *rest = torch.cat([means, *(t.detach().to(means).reshape(1) for t in told)]).tolist()
        nats = 0.0 if kl is None else rest.pop(0)
        weight = rest.pop(0) if isinstance(kl_weight, Tensor) else float(kl_weight)
        at_means = None if self._at_means is None else 100.0 * rest.pop(0)
        if self._labels is not None:
            self._labels.check(*rest)
        if not math.isfinite(minimised):
            raise self._nonfinite(minimised)
        return Step(self._step, steps, loss, 100.0 * accuracy, nats, weight, accuracy_at_means=at_means)

    def check_loss(self) -> None:
        """Raise if a sample's loss is not finite; waits for the device."""
        for *_, minimised in (figures.tolist() for figures in self._figures):
            if not math.isfinite(minimised):
                raise self._nonfinite(minimised)

    def _check_mean(self, loss: Any) -> None:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UsageError(
                f"{self._role.loss} must return one mean loss, not {found}; a loss per example wants .mean()"
            )
        if not loss.requires_grad:
            raise UsageError(
                f"{self._role.loss} returns a loss without a gradient: compute it from the logits by functions that "
                "have one"
            )

    def _nonfinite(self, loss: float) -> "_LossNotFinite":
        return _LossNotFinite(f"the loss is {loss} at step {self._step}; {_ADVICE}")


def _share_predicted(here: Sequences, logits: Tensor, targets: Tensor) -> Tensor:
    """This rank's part of the share of a batch's tokens that are predicted."""
    if len(targets) == 0:
        return logits.new_zeros((), dtype=torch.float64)
    return (logits.argmax(dim=-1) == targets).double().mean() * here.share()


def _predicted(logits: Tensor, targets: Tensor) -> Tensor | None:
    """Whether each class number is predicted; ``None`` where targets are none."""
    if targets.is_floating_point() or logits.ndim != targets.ndim + 1:
        return None
    logits, targets = as_rows(logits, targets)
    return logits.argmax(dim=-1) == targets


class _LossNotFinite(NonFiniteError):
    """The loss itself is NaN or infinite, which says more than that the gradients are."""


_ADVICE = "the weights are the last good means. Lower lr, data_per_step or std_init, or look for the cause in the data"


@contextmanager
def _told_where(gradients: Gradients, step: int, sampled: Sampled | None = None) -> Iterator[None]:
    """Let the optimizer's finding that an update was not finite name the parameters and the step."""
    try:
        yield
    except NonFiniteError as error:
        if isinstance(error, _LossNotFinite):
            raise
        if sampled is not None:
            sampled.check_loss()
        names = gradients.nonfinite()
        if not names:
            raise NonFiniteError(f"{error} (at step {step})") from error
        raise NonFiniteError(
            f"the gradient of {', '.join(names[:5])} is NaN or infinite at step {step}; {_ADVICE}"
        ) from error
