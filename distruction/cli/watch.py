"""What a run tells while it is at work: a JSON line for each step, and a checkpoint where it is told to end."""

import json
import math
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from .. import distributed
from ..loop import Step, Terminated


class Watch:
    """The callback of a command's run, inside of whose ``with`` SIGTERM ends the run after the step at work.

    Args:
        path: file to which a JSON line is appended for each step: ``step``, ``steps``, ``loss``, ``accuracy``, ``kl``,
            ``kl_weight``, ``probability``, ``seconds_left``; or ``None``.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._start: tuple[int, float] | None = None
        self._asked = False
        self._earlier: Any = None

    def __enter__(self) -> "Watch":
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
        if self._asked:
            raise Terminated
