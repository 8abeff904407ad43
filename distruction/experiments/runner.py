"""Run jobs in worker processes, in the order that their needs allow, and record what failed."""

import contextlib
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from ..errors import UsageError
from ..extras import needed
from .jobs import Job
from .materials import Context
from .store import Store
from .work import execute
from .workers import Pool, device, done

with needed("experiments"):
    from filelock import FileLock, Timeout
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        done: jobs that were executed now.
        reused: jobs whose entry was there already.
        failures: job id to (title, message).
    """

    done: int = 0
    reused: int = 0
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold the folder's lock.

    Raises:
        UsageError: another process has it.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(f"another bench is running in {root}; wait for it or choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def missing(cells: Sequence[Job], store: Store) -> tuple[dict[str, Job], dict[str, set[str]], int]:
    """The jobs to do, the edges among them, and how many results are reused.

    A cell's needs are asked for only if it has to run.
    """
    todo: dict[str, Job] = {}
    needs: dict[str, set[str]] = {}
    finished: set[str] = set()
    waiting = list(cells)
    while waiting:
        job = waiting.pop()
        if job.id in todo or job.id in finished:
            continue
        if store.load(job.kind, job.facts) is not None:
            finished.add(job.id)
            continue
        todo[job.id] = job
        needs[job.id] = {need.id for need in job.needs()}
        waiting.extend(job.needs())
    return todo, {i: n - finished for i, n in needs.items()}, len(finished)


def run(cells: Sequence[Job], context: Context, *, devices: Sequence[str], threads: int, progress: bool) -> Outcome:
    """Do every job that the cells need and that has no valid entry yet.

    Args:
        devices: one worker process for each entry; an entry may be repeated.
        threads: CPU threads of a worker.

    Returns:
        What was done, reused, and what failed (with those that needed it).
    """
    store = Store(context.store)
    store.sweep_drafts()
    todo, needs, reused = missing(cells, store)
    outcome = Outcome(reused=reused)
    seconds: dict[str, list[float]] = defaultdict(list)
    left = dict(todo)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Pool(devices, threads) as pool, Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("bench", total=len(todo) + reused, completed=reused, left="")

        def start(name: str) -> Future[float]:
            return pool.submit(_work, todo[name], context)

        for name, future in done(needs, start, len(devices)):
            if error := future.exception():
                outcome.failures[name] = (todo[name].title, "".join(traceback.format_exception(error)).strip())
            else:
                outcome.done += 1
                seconds[_sort(left.pop(name))].append(future.result())
            bar.update(
                task,
                completed=outcome.done + reused,
                description=f"bench ({len(outcome.failures)} failed)" if outcome.failures else "bench",
                left=_time_left(list(left.values()), seconds, len(devices)),
            )
    for name, job in left.items():
        outcome.failures.setdefault(name, (job.title, "not run: a job that it needs failed"))
    return outcome


def _work(job: Job, context: Context) -> float:
    return execute(job, replace(context, device=device()))


def _sort(job: Job) -> str:
    """Jobs of one sort take about the same time."""
    return job.kind + str(job.facts.get("method", ""))


def _time_left(left: Sequence[Job], seconds: Mapping[str, Sequence[float]], workers: int) -> str:
    known = [s for sort in seconds.values() for s in sort]
    if not known:
        return ""
    overall = sum(known) / len(known)
    total = sum(sum(s) / len(s) if (s := seconds.get(_sort(job))) else overall for job in left)
    return f"about {timedelta(seconds=round(total / workers))} left"
