"""What limits an op of the C++ backend on this CPU: ``python -m benchmarks.profile``.

Two views. The same number of elements is processed from memory and in portions that stay in a core's cache, beside a
triad of the op's bytes: where the time in the cache is near the whole, arithmetic is the limit, and where the triad's
is, memory. And ``perf``, where it is installed, samples which functions of the kernels the time goes to; every stage
is a function of its own.
"""

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from os import getpid
from typing import Annotated

import torch
import typer

from . import contestants, harness
from .harness import Contestant
from .our_ops import Workload

MEMORY, CACHE = "from memory", "in the cache"
IN_CACHE = 2**14
"""Elements of a portion: at most twelve float32 arrays of them are 768 KiB."""


def in_cache(numel: int, threads: int) -> Workload:
    """A workload of ``numel`` elements that are the same few over and over again, others for each thread."""
    workload = Workload([torch.Size([IN_CACHE])] * threads, torch.device("cpu"))
    times = numel // IN_CACHE // threads
    for name in ("param", "grad", "prior_mean", "prior_std", "mean", "std", "m1", "m2"):
        setattr(workload, name, [t for t in getattr(workload, name) for _ in range(times)])
    return workload


def limits(op: str, numel: int, threads: int, rounds: int) -> dict[str, float]:
    """Milliseconds of ``op`` on about ``numel`` elements from memory, in the cache, and of a triad of its bytes."""
    device = torch.device("cpu")
    numel = max(1, numel // IN_CACHE // threads) * IN_CACHE * threads
    workloads = {
        MEMORY: Workload([torch.Size([numel])], device),
        CACHE: in_cache(numel, threads),
    }
    made = {name: contestants.OPS[op].ours(w, "cpp")[""] for name, w in workloads.items()}
    made[harness.TRIAD] = harness.triad(4 * contestants.OPS[op].arrays * numel, device)
    return {n: 1e3 * t.median for n, t in harness.measure(made, harness.wall_time, rounds=rounds).items()}


def functions(run: Contestant, seconds: float) -> list[tuple[float, str]]:
    """Share of the samples, in percent, and function, largest first, while ``run`` is repeated for ``seconds``.

    Raises:
        RuntimeError: ``perf`` found nothing, with what it said.
    """
    with tempfile.NamedTemporaryFile(suffix=".data") as file:
        record = ["perf", "record", "-e", "cpu-clock", "-F", "997", "-p", str(getpid()), "-o", file.name]
        with subprocess.Popen(record, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as perf:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                run()
            perf.send_signal(signal.SIGINT)
            _, said = perf.communicate()
        report = ["perf", "report", "-i", file.name, "--stdio", "--sort", "symbol", "--percent-limit", "1"]
        lines = subprocess.run(report, capture_output=True, text=True).stdout.splitlines()
    found = [m.groups() for line in lines if (m := re.match(r"\s+([\d.]+)%\s+\[.\]\s+(.*\S)", line))]
    if not found:
        raise RuntimeError(f"perf sampled nothing: {said.strip()}")
    return [(float(share), re.sub(r"\s{2,}.*", "", name)) for share, name in found]


def lines_of(op: str, times: dict[str, float], shares: Sequence[tuple[float, str]]) -> str:
    """The profile as text."""
    head = ", ".join(f"{name} {ms:.3g} ms" for name, ms in times.items())
    larger, limit = max((times[CACHE], "arithmetic"), (times[harness.TRIAD], "memory"))
    text = [f"{op}: {head}; {limit} is the limit, {larger / times[MEMORY]:.0%} of the time"]
    return "\n".join([*text, *(f"{share:6.1f} %  {name}" for share, name in shares)]) + "\n"


def main(
    op: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(contestants.OPS)}; repeatable.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Host threads.")] = 1,
    parameters: Annotated[int, typer.Option(min=IN_CACHE, help="Elements.")] = 2**25,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls.")] = 15,
    seconds: Annotated[float, typer.Option(help="To sample each op for.")] = 4.0,
) -> None:
    """Print what limits the ops, and where their time goes."""
    torch.set_num_threads(threads)
    with torch.no_grad():
        for name in op or ("sample", "step without prior", "step with prior"):
            times = limits(name, parameters, threads, rounds)
            shares: list[tuple[float, str]] = []
            if shutil.which("perf"):
                workload = Workload([torch.Size([parameters])], torch.device("cpu"))
                shares = functions(contestants.OPS[name].ours(workload, "cpp")[""], seconds)
            print(lines_of(name, times, shares))


if __name__ == "__main__":
    typer.run(main)
