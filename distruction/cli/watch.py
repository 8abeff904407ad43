"""What a run tells while it is at work: a line for each step to whoever logs it, and a checkpoint at SIGTERM."""

import json
import math
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from .. import distributed
from ..loggers import TensorBoard, WandB
from ..loop import Step, Terminated


class Watch:
    """The callback of a command's run, inside of whose ``with`` SIGTERM ends the run after the step at work.

    Args:
        path: file to which a JSON line is appended for each step: ``step``, ``steps``, ``loss``, ``accuracy``, ``kl``,
            ``kl_weight``, ``probability``, ``accuracy_at_means``, ``seconds_left``; or ``None``.
        tensorboard: folder of TensorBoard's event files; or ``None``.
        wandb: project of Weights & Biases; or ``None``.

    Raises:
        MissingPackage: one of these packages is not installed.
    """

    def __init__(self, path: Path | None, tensorboard: Path | None = None, wandb: str | None = None) -> None:
        self._path = path
        self._loggers: list[TensorBoard | WandB] = []
        if tensorboard is not None:
            self._loggers.append(TensorBoard(tensorboard))
        if wandb is not None:
            self._loggers.append(WandB(wandb))
        self._open = ExitStack()
        self._file: IO[str] | None = None
        self._start: tuple[int, float] | None = None
        self._asked = False
        self._earlier: Any = None

    def __enter__(self) -> "Watch":
        for logger in self._loggers:
            self._open.enter_context(logger)
        if self._path is not None and distributed.rank() == 0:
            self._file = self._path.open("a", encoding="utf-8")
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)
        if self._file is not None:
            self._file.close()
        self._open.__exit__(kind, error, at)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __call__(self, step: Step) -> None:
        """Tell of a step.

        Raises:
            Terminated: SIGTERM has come.
        """
        now = time.monotonic()
        if self._start is None:
            self._start = (step.step, now)
        if self._file is not None:
            done = step.step - self._start[0]
            left = (step.steps - step.step) * (now - self._start[1]) / done if done else None
            facts = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(step).items()}
            self._file.write(json.dumps({**facts, "seconds_left": left}) + "\n")
            self._file.flush()
        for logger in self._loggers:
            logger(step)
        if self._asked:
            raise Terminated
