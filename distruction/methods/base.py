"""What every method is given, what it must say of itself, and the loops that several of them share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import Images, loader
from ..errors import NonFiniteError, UsageError
from ..forget_report import ForgetReport
from ..forgetting import forget
from ..objectives import Objective
from ..posterior import Posterior

Batch = tuple[Tensor, Tensor]


class Counted(Dataset[Batch]):
    """Images that count each example read through them; labels may be looked at without a count.

    Attributes:
        labels: int64, (N,).
        reads: examples read so far, repetitions included.
        seen: bool, (N,): which examples were read at least once.
    """

    def __init__(self, data: Images) -> None:
        self._data = data
        self.labels = data.labels
        self.classes = data.classes
        self.reads = 0
        self.seen = torch.zeros(len(data), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Sequence[int]) -> Batch:
        self.reads += len(index)
        self.seen[torch.as_tensor(index)] = True
        return self._data[index]


class Mixed(Dataset[Batch]):
    """Sources put together as one data set, each with labels of the method's own.

    Args:
        parts: (source, labels); indexing a source with a list gives a pair whose first entry is the inputs.
    """

    def __init__(self, *parts: tuple[Dataset[Any], Tensor]) -> None:
        self.parts = parts
        self.labels = torch.cat([labels for _, labels in parts])
        self.starts = [0]
        for _, labels in parts:
            self.starts.append(self.starts[-1] + len(labels))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: Sequence[int]) -> Batch:
        where = torch.as_tensor(index)
        inputs, places = [], []
        for (source, _), start, stop in zip(self.parts, self.starts, self.starts[1:], strict=False):
            mine = ((where >= start) & (where < stop)).nonzero().squeeze(-1)
            if len(mine):
                inputs.append(source[(where[mine] - start).tolist()][0])
                places.append(mine)
        # A method's own tensors, such as UNSIR's noise, may be on another device than the data's batches.
        device = inputs[-1].device
        return torch.cat([i.to(device) for i in inputs])[torch.cat(places).argsort().to(device)], self.labels[where]


class Selected(Dataset[Batch]):
    """Some positions of a source; reads count there."""

    def __init__(self, source: Dataset[Any], positions: Tensor) -> None:
        self.source = source
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Sequence[int]) -> Batch:
        batch: Batch = self.source[self.positions[torch.as_tensor(index)].tolist()]
        return batch


@dataclass
class Task:
    """One unlearning problem.

    Attributes:
        model: the trained model; a method changes it in place and leaves it in eval mode.
        forget: the training examples to forget.
        retain: the other training examples; reading them is counted.
        fresh: makes a model as it was before training: random, or with pretrained weights and a new head.
        train: ``(model, data)``, the recipe that trained ``model``.
        posterior: of ``model``, from `distruction.prepare`; only methods that need it are given one.
        seed: of everything that a method draws beside the global generator.
        backend: see `distruction.ops`.
        progress: show progress bars.
    """

    model: nn.Module
    forget: Counted
    retain: Counted
    fresh: Callable[[], nn.Module]
    train: Callable[[nn.Module, Dataset[Any]], None]
    posterior: Posterior | None = None
    seed: int = 0
    backend: str = "auto"
    progress: bool = False

    @property
    def prior(self) -> Posterior:
        """The posterior.

        Raises:
            UsageError: the task has none.
        """
        if self.posterior is None:
            raise UsageError("this method needs the posterior of preparation: pass Task(posterior=prepare(...))")
        return self.posterior

    @property
    def num_classes(self) -> int:
        """Size of the label space."""
        return len(self.forget.classes)


@dataclass(frozen=True)
class Method:
    """A method and what it declares.

    Attributes:
        summary: one line.
        paper: authors, year and link.
        run: ``(task, **settings)``; returns a report when it keeps one.
        reads: how much of the retain data it reads.
        needs_posterior: whether the task must hold the posterior of preparation.
        preparation: how that is prepared: as published, as `distruction.prepare` does by default, or the latter with
            other stds (`ablations`).
        ablation: whether it is run only where a grid names it.
        sweep: its main hyper-parameter, for trade-off curves; empty where there is none.
        scenarios: where it is defined.
        revision: raised when its result changes for the same settings, so that no stored one is taken.
    """

    summary: str
    paper: str
    run: Callable[..., ForgetReport | None]
    reads: Literal["all", "part", "none"]
    needs_posterior: bool = False
    preparation: Literal["bgd", "gauss-newton", "constant", "fisher"] = "bgd"
    ablation: bool = False
    sweep: str = ""
    scenarios: tuple[str, ...] = field(default=("full-class", "sub-class", "random"))
    revision: int = 0


def fit(
    model: nn.Module,
    loader: Iterable[Batch],
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """One pass over ``loader`` in training mode; ``loss_fn`` is given (logits, targets, inputs). Ends in eval mode.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
    """
    device = next(model.parameters()).device
    model.train()
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model(x), y, x)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss.item()}; lower lr (now {optimizer.param_groups[0]['lr']})")
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def forget_with(
    task: Task,
    objective: str | Objective,
    data: Dataset[Any],
    *,
    steps: int = 150,
    kl_weight: float = 0.1,
    data_per_step: float = 100.0,
    lr: float = 1.0,
    mc_samples: int = 2,
    batch_size: int = 64,
) -> ForgetReport:
    """Minimise (1 - kl_weight) E_q[objective] + kl_weight KL(q || prior) on ``data``, as the paper does.

    By samples of q, whose stds are learned as well; see `distruction.forget`.
    """
    return forget(
        task.model,
        task.prior,
        loader(data, batch_size=batch_size, shuffle=True),
        objective=objective,
        steps=steps,
        kl_weight=kl_weight,
        data_per_step=data_per_step,
        lr=lr,
        mc_samples=mc_samples,
        seed=task.seed,
        backend=task.backend,
        progress=task.progress,
    )
