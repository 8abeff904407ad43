"""Run jobs in worker processes, in the order that their needs allow, and record what failed."""

import contextlib
import multiprocessing
import os
import threading
import traceback
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import timedelta
from graphlib import TopologicalSorter
from multiprocessing.connection import wait as wait_for_handle
from pathlib import Path
from typing import Any

import torch

from ..errors import DataWarning, UsageError
from ..extras import needed
from .jobs import Job
from .materials import Context
from .store import Store
from .work import execute

with needed("experiments"):
    from filelock import FileLock, Timeout
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ATTEMPTS = 2
"""Times that a job's worker process may die under it alone. A death takes the neighbours' jobs with it, so that only a
job that ran alone is charged with it."""


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
        raise UsageError(f"another bench is running in {root}; wait for it or choose another --out") from error
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
    sorter = TopologicalSorter(needs)
    sorter.prepare()
    deaths: dict[str, int] = defaultdict(int)
    alone = False
    seconds: dict[str, list[float]] = defaultdict(list)
    left = dict(todo)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with _Pool(devices, threads) as pool, Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("bench", total=len(todo) + reused, completed=reused, left="")
        running: dict[Future[float], str] = {}
        ready: deque[str] = deque()
        suspects: deque[str] = deque()
        while sorter.is_active():
            ready.extend(sorter.get_ready())
            # Jobs that were interrupted by a death run one at a time, so that the next one has a culprit.
            queue, room = (suspects, 1) if suspects else (ready, len(devices))
            while queue and len(running) < room:
                name = queue.popleft()
                running[pool.submit(todo[name], context)] = name
                alone = queue is suspects or len(devices) == 1
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    deaths[name] += alone
                    if deaths[name] < ATTEMPTS:
                        suspects.append(name)
                        continue
                if error is None:
                    sorter.done(name)
                    outcome.done += 1
                    seconds[_sort(left.pop(name))].append(future.result())
                else:
                    outcome.failures[name] = (todo[name].title, "".join(traceback.format_exception(error)).strip())
            bar.update(
                task,
                completed=outcome.done + reused,
                description=f"bench ({len(outcome.failures)} failed)" if outcome.failures else "bench",
                left=_time_left(list(left.values()), seconds, len(devices)),
            )
    for name, job in left.items():
        outcome.failures.setdefault(name, (job.title, "not run: a job that it needs failed"))
    return outcome


class _Pool:
    """Worker processes, one for each device; a pool that broke is replaced at the next submission."""

    def __init__(self, devices: Sequence[str], threads: int) -> None:
        self.devices = devices
        self.threads = threads
        self.executor = self._start()

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self.executor.shutdown(wait=error[0] is None, cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        # Forking a process that has started threads or CUDA is not safe.
        spawn = multiprocessing.get_context("spawn")
        devices = spawn.SimpleQueue()
        for device in self.devices:
            devices.put(device)
        return ProcessPoolExecutor(
            len(self.devices), mp_context=spawn, initializer=_initialise, initargs=(devices, self.threads)
        )

    def submit(self, job: Job, context: Context) -> Future[float]:
        """Queue a job."""
        try:
            return self.executor.submit(_work, job, context)
        except BrokenProcessPool:
            self.executor.shutdown()
            self.executor = self._start()
            return self.executor.submit(_work, job, context)


_device = "cpu"


def _initialise(devices: Any, threads: int) -> None:
    global _device
    _device = devices.get()
    torch.set_num_threads(threads)
    # The process that started the workers has said it.
    warnings.simplefilter("ignore", DataWarning)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for_handle([parent.sentinel])
        os._exit(1)

    # A pool's workers outlive a parent that was killed.
    threading.Thread(target=follow, daemon=True).start()


def _work(job: Job, context: Context) -> float:
    return execute(job, replace(context, device=_device))


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
