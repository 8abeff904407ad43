"""Checkpoints of a run: a posterior file whose metadata says how far the run is."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import distributed
from ..errors import PosteriorError, UsageError
from ..files import check_writable, remove_leftovers
from ..modules import learnable
from ..optim import BGD
from ..posterior import Posterior
from .step import Controller, Step


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
        if not self.seconds >= 0:
            raise UsageError(f"checkpoint_seconds must be >= 0, not {self.seconds}")
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

    def save(
        self, optimizer: BGD, history: list[Step], *, stopped: bool = False, controller: Controller | None = None
    ) -> None:
        """Write the optimizer's posterior, the history and the controller's state atomically."""
        posterior = optimizer.posterior(copy=False)
        draw = optimizer.state_dict()["param_groups"][0]["draw"]
        posterior.metadata["checkpoint"] = {
            "settings": self.settings,
            "draw": draw,
            "history": [asdict(s) for s in history],
            "stopped": stopped,
            "controller": None if controller is None else controller.state_dict(),
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
