"""Callbacks that hand a run's figures to TensorBoard or Weights & Biases, through these packages' own writers.

    with TensorBoard("runs/request-7") as logger:
        forget(model, posterior, loader, callback=logger)

Each step's loss, accuracy, KL, lambda and forgetting level are scalars of these names. On several ranks the first
writes. A resumed run goes on where its checkpoint was: what TensorBoard was told of later steps is told anew.
"""

import math
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from . import distributed
from .errors import UsageError
from .extras import needed
from .files import check_writable
from .loop import Step


def figures(step: Step) -> dict[str, float]:
    """The numbers of a step that are there and finite."""
    facts = {k: v for k, v in asdict(step).items() if k not in ("step", "steps")}
    return {k: float(v) for k, v in facts.items() if v is not None and math.isfinite(v)}


class TensorBoard:
    """Event files of TensorBoard, from the first step on.

    Args:
        folder: where they are written; it is made where it is missing.

    Raises:
        MissingPackage: tensorboard is not installed.
        OSError: nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        with needed("tensorboard", "a log for TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

        self._make: Any = SummaryWriter
        self._folder = os.fspath(folder)
        Path(self._folder).mkdir(parents=True, exist_ok=True)
        check_writable(Path(self._folder, "events"))
        self._writer: Any = None

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __call__(self, step: Step) -> None:
        """Write the figures of a step."""
        if distributed.rank() > 0:
            return
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=step.step, flush_secs=10)
        for name, value in figures(step).items():
            self._writer.add_scalar(name, value, step.step)

    def close(self) -> None:
        """Write what is left to be written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """A run of Weights & Biases, from the first step on. Whether it is sent anywhere is wandb's own setting.

    Args:
        project: its name.
        settings: further arguments of ``wandb.init``, such as ``mode="offline"``.

    Raises:
        MissingPackage: wandb is not installed.
        UsageError: the name is empty.
    """

    def __init__(self, project: str, **settings: Any) -> None:
        if not project.strip():
            raise UsageError("the project of Weights & Biases has no name")
        with needed("wandb", "a log for Weights & Biases"):
            import wandb

        self._wandb: Any = wandb
        self._settings = {"project": project, **settings}
        self._begun = False

    def __enter__(self) -> "WandB":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(0 if kind is None else 1)

    def __call__(self, step: Step) -> None:
        """Log the figures of a step."""
        if distributed.rank() > 0:
            return
        if not self._begun:
            self._wandb.init(**self._settings)
            self._begun = True
        self._wandb.log(figures(step), step=step.step)

    def close(self, exit_code: int = 0) -> None:
        """End the run."""
        if self._begun:
            self._wandb.finish(exit_code=exit_code)
            self._begun = False
