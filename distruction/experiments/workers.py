"""Worker processes, and work that is done in the order that its needs allow."""

import multiprocessing
import os
import threading
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from graphlib import TopologicalSorter
from multiprocessing.connection import wait as wait_for_handle
from typing import Any, TypeVar

import torch

from ..errors import DataWarning

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

ATTEMPTS = 2
"""Times that a job's worker process may die under it alone. A death takes the job's neighbours with it, so that only a
job that ran alone is charged with it."""


def done(
    needs: Mapping[Key, Collection[Key]], start: Callable[[Key], Future[Result]], room: int
) -> Iterator[tuple[Key, Future[Result]]]:
    """Start every job once all that it needs ended well, and yield each with its future when it has ended.

    Jobs start in the order in which they became ready, those that did so together in that of ``needs``. One that needs
    a job that failed is never started; one whose process died is started again, at most `ATTEMPTS` times alone.

    Args:
        needs: job to the jobs that it needs, all of which are keys too.
        start: submits a job to a `Pool`.
        room: jobs that run at the same time.
    """
    sorter = TopologicalSorter(needs)
    sorter.prepare()
    deaths: dict[Key, int] = defaultdict(int)
    alone = False
    running: dict[Future[Result], Key] = {}
    ready: deque[Key] = deque()
    suspects: deque[Key] = deque()
    while sorter.is_active():
        ready.extend(sorter.get_ready())
        # Jobs that were interrupted by a death run one at a time, so that the next one has a culprit.
        queue, most = (suspects, 1) if suspects else (ready, room)
        while queue and len(running) < most:
            key = queue.popleft()
            running[start(key)] = key
            alone = queue is suspects or room == 1
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            key = running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                deaths[key] += alone
                if deaths[key] < ATTEMPTS:
                    suspects.append(key)
                    continue
            if error is None:
                sorter.done(key)
            yield key, future


class Pool:
    """Worker processes, one for each device; a pool that broke is replaced at the next submission.

    Args:
        devices: their names; one may be repeated.
        threads: CPU threads of a worker.
    """

    def __init__(self, devices: Sequence[str], threads: int) -> None:
        self.devices = devices
        self.threads = threads
        self.executor = self._start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        # Nobody may write what workers write before these have ended, whatever the error.
        self.executor.shutdown(cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        # Forking a process that has started threads or CUDA is not safe.
        spawn = multiprocessing.get_context("spawn")
        devices = spawn.SimpleQueue()
        for device in self.devices:
            devices.put(device)
        return ProcessPoolExecutor(
            len(self.devices), mp_context=spawn, initializer=_initialise, initargs=(devices, self.threads)
        )

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Queue a call in a worker."""
        try:
            return self.executor.submit(function, *args)
        except BrokenProcessPool:
            self.executor.shutdown()
            self.executor = self._start()
            return self.executor.submit(function, *args)


_device = "cpu"


def device() -> str:
    """The device of this worker."""
    return _device


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
