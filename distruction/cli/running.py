"""How a run goes: the options that ``prepare`` and ``forget`` share, as one argument of a command's function."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .options import (
    Backend,
    CheckpointFile,
    CheckpointSeconds,
    CheckpointSteps,
    Device,
    LogJson,
    Overwrite,
    Progress,
    ReleaseGradients,
    Seed,
    SkipUnreadable,
    TensorBoardFolder,
    WandBProject,
    Workers,
)
from .watch import Watch


@dataclass(frozen=True)
class Running:
    """The options, each a field of its name."""

    checkpoint: CheckpointFile = None
    checkpoint_seconds: CheckpointSeconds = 60.0
    checkpoint_steps: CheckpointSteps = None
    release_gradients: ReleaseGradients = False
    skip_unreadable: SkipUnreadable = False
    workers: Workers = 4
    log_json: LogJson = None
    tensorboard: TensorBoardFolder = None
    wandb: WandBProject = None
    seed: Seed = 0
    device: Device = "auto"
    backend: Backend = "auto"
    progress: Progress = True
    overwrite: Overwrite = False

    def watch(self) -> Watch:
        """What tells of the run while it is at work."""
        return Watch(self.log_json, self.tensorboard, self.wandb)

    def arguments(self) -> dict[str, Any]:
        """Those that `distruction.prepare` and `distruction.forget` take."""
        names = ("checkpoint", "checkpoint_seconds", "checkpoint_steps", "release_gradients", "seed", "backend")
        return {"keep_checkpoint": True, "progress": self.progress, **{n: getattr(self, n) for n in names}}


def with_running(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of `Running` as options in the place of its last parameter, ``running``."""
    options = inspect.signature(Running).parameters
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "running"]

    @functools.wraps(command)
    def spread(**given: Any) -> None:
        running = Running(**{name: given.pop(name) for name in options})
        command(**given, running=running)

    # What typer reads the options from.
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *options.values())]
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # a function may have one
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    return spread
