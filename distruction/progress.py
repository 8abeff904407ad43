"""A progress bar where rich is installed and somebody looks, and nothing otherwise: the core does without it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(title: str, total: int, *, completed: int = 0, hidden: bool = False) -> Iterator[Callable[[int, str], object]]:
    """A bar that is gone after the block, as a function ``(completed, text)`` that moves it."""
    if not hidden:
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ModuleNotFoundError:
            hidden = True
    if hidden:
        yield lambda completed, text: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as shown:
        task = shown.add_task(title, total=total, completed=completed)
        yield lambda completed, text: shown.update(task, completed=completed, description=text)
