"""Ctrl-C held back while something is done that must not be left halfway."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class held:
    """Hold the first Ctrl-C back until the block has ended; a second one comes at once.

    For blocks that are short, or whose long part is in a ``with`` of the context's `let_through`. Nothing is held where
    Python's own handler of SIGINT would not run: in other threads than the main one, and where SIGINT is ignored or
    handled outside of Python.

    (Classes, because Ctrl-C may come in contextlib's own lines, before they resume a generator.)
    """

    def __init__(self) -> None:
        handler = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        self._handler = handler if main and callable(handler) else None
        self._come: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> "held":
        self._hold()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._release()

    def let_through(self) -> "_LetThrough":
        """A context inside of which Ctrl-C comes at once, that which is held back at its start."""
        return _LetThrough(self._release, self._hold)

    def _hold(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._keep)

    def _release(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._come:
                self._handler(*self._come.pop())

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._come.append((number, frame))
        signal.signal(signal.SIGINT, self._handler)


class _LetThrough:
    def __init__(self, release: Callable[[], None], hold: Callable[[], None]) -> None:
        self._release = release
        self._hold = hold

    def __enter__(self) -> None:
        self._release()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hold()
