"""Timing side by side: interleaved rounds, medians with quantiles, ratios to a baseline and to the memory's speed.

A machine's speed drifts by more than the differences of interest, so contestants take turns in every round, in
random order, and only ratios within one run are meant to be compared.
"""

import csv
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from distruction.files import write_atomically

Contestant = Callable[[], object]
Timer = Callable[[Contestant], float]

TRIAD, COPY = "triad", "copy"
"""The contestants that stand for the memory's speed, on CPUs and on GPUs: see `triad` and `copy`."""


def wall_time(run: Contestant) -> float:
    """Seconds that ``run`` takes on the host's clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def event_time(run: Contestant) -> float:
    """Seconds between two events of the GPU around ``run``: the gaps in which it waits for the host count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class QueuedTime:
    """Seconds of the GPU's own work in a call, as in a training loop whose host runs ahead.

    A kernel that only waits goes first, so that the call is queued before its first kernel begins; the wait grows
    until that holds. A call of more kernels than the driver queues (about a thousand), or one that waits for the
    device, cannot be queued: its gaps count.
    """

    SHORTEST, LONGEST = 2**19, 2**26  # cycles, about 0.3 and 40 ms

    def __init__(self) -> None:
        self._cycles: dict[Contestant, int] = {}

    def __call__(self, run: Contestant) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        while True:
            cycles = self._cycles.setdefault(run, self.SHORTEST)
            torch.cuda.synchronize()
            torch.cuda._sleep(cycles)
            start.record()
            run()
            end.record()
            queued = not start.query()
            end.synchronize()
            if queued or cycles >= self.LONGEST:
                return float(start.elapsed_time(end)) / 1e3
            self._cycles[run] = 4 * cycles


def host_time(run: Contestant, repeats: int = 5) -> float:
    """Median seconds until a call returns to the host, which need not wait for the device."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        seconds.append(wall_time(run))
    synchronize()
    return statistics.median(seconds)


def launches(run: Contestant) -> int:
    """Kernels that a call launches on the GPU, counted by the profiler; copies and fills by the driver are none."""
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize()
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in profiler.events() or ()
    )


def peak_memory(run: Contestant) -> int:
    """Bytes that a call allocates on the GPU beyond what was allocated, at its peak."""
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def graphed(run: Contestant) -> Contestant:
    """``run`` captured in a CUDA graph; the call replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quantiles 0.2 and 0.8 over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        quantiles = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), quantiles[0], quantiles[3], len(seconds))


@dataclass(frozen=True)
class Repeated:
    """A contestant that calls ``run`` several times, where one call's time depends on its turn; see `measure`."""

    run: Contestant
    times: int

    def __call__(self) -> None:
        for _ in range(self.times):
            self.run()


def measure(
    contestants: Mapping[str, Contestant],
    timer: Timer,
    *,
    rounds: int = 25,
    warmup: int = 2,
    budget: float = 20.0,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time all contestants in turn; the time of a `Repeated` one is that of one of its calls, on average.

    Args:
        contestants: name to the call to time.
        timer: seconds of one call.
        rounds: timed calls of each, >= 2; a round calls every contestant once, in random order.
        warmup: untimed calls of each beforehand (compilation, first allocations).
        budget: seconds after which a slow contestant sits out the remaining rounds (after three at least).
        seed: of the order.
    """
    for run in contestants.values():
        for _ in range(warmup):
            timer(run)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if len(seconds[name]) < 3 or sum(seconds[name]) < budget:
                seconds[name].append(timer(contestants[name]))
    times = {name: run.times if isinstance(run, Repeated) else 1 for name, run in contestants.items()}
    return {name: Timing.of([t / times[name] for t in s]) for name, s in seconds.items()}


def copy(size: int, device: torch.device) -> Contestant:
    """A copy that reads and writes ``size`` bytes together."""
    a, b = (torch.ones(size // 8, device=device) for _ in range(2))
    return lambda: b.copy_(a)


def triad(size: int, device: torch.device) -> Contestant:
    """STREAM's triad, a <- b + scalar * c, over arrays that make ``size`` bytes together (McCalpin 1995).

    As in STREAM, each array counts once, although a CPU also reads the lines of ``a`` before it writes them.
    """
    a, b, c = (torch.ones(size // 12, device=device) for _ in range(3))
    return lambda: torch.add(b, c, alpha=0.5, out=a)


@dataclass(frozen=True)
class Row:
    """One contestant's result; times are milliseconds, memory is MiB."""

    model: str
    parameters: int
    threads: int  # of the host
    op: str
    contestant: str
    median: float
    low: float
    high: float
    rounds: int
    speedup: float | None  # the baseline's median / this one's
    of_limit: float | None  # the median of a triad or copy of the op's bytes / this one's
    host: float | None = None  # `host_time`
    launches: int | None = None
    peak: float | None = None  # `peak_memory`


def rows_of(
    timings: Mapping[str, Timing],
    *,
    baseline: str,
    limit: str | None,
    model: str,
    parameters: int,
    threads: int,
    op: str,
    details: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:
    """The results of one `measure`.

    Args:
        baseline, limit: the contestants that the ratios are to; ``None`` for one that was not timed.
        details: contestant to further fields of its row.
    """
    return [
        Row(
            model=model,
            parameters=parameters,
            threads=threads,
            op=op,
            contestant=name,
            median=_milliseconds(t.median),
            low=_milliseconds(t.low),
            high=_milliseconds(t.high),
            rounds=t.rounds,
            speedup=_ratio(timings, baseline, t),
            of_limit=_ratio(timings, limit, t),
            **(details or {}).get(name, {}),
        )
        for name, t in timings.items()
    ]


def _ratio(timings: Mapping[str, Timing], of: str | None, to: Timing) -> float | None:
    return None if of is None or of not in timings else round(timings[of].median / to.median, 3)


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 4)


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know of the machine and the versions."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "timm", "ivon-opt", "distruction"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"device": _device_name(device), "cores": os.cpu_count(), "versions": versions}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, check=True).stdout
    fields = {entry["field"].rstrip(":"): entry["data"] for entry in json.loads(info)["lscpu"]}
    wide = "with" if "avx512f" in fields.get("Flags", "") else "without"
    numbers = f"family {fields.get('CPU family', '?')}, model {fields.get('Model', '?')}"
    return f"{fields['Model name']} ({numbers}), {wide} AVX-512"


def write(stem: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write ``stem`` with the suffixes .json, .csv and .png, each atomically.

    Args:
        stem: path without suffix.
        rows: the results.
        facts: what is true of all rows: `environment`, the command.
    """
    records = [asdict(r) for r in rows]
    text = json.dumps({**facts, "rows": records}, indent=1) + "\n"

    def write_json(name: str) -> None:
        Path(name).write_text(text)

    common = {"device": facts["device"], **facts["versions"]}

    def write_csv(name: str) -> None:
        with open(name, "w", newline="") as file:
            writer = csv.DictWriter(file, [*records[0], *common], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**record, **common} for record in records)

    write_atomically(stem.with_suffix(".json"), write_json)
    write_atomically(stem.with_suffix(".csv"), write_csv)
    write_atomically(stem.with_suffix(".png"), lambda name: _plot(name, rows, facts["device"]))


def _plot(path: str, rows: Sequence[Row], device: str) -> None:
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.threads, row.op), []).append(row)
    ops = list(dict.fromkeys(op for _, _, op in groups))
    settings = list(dict.fromkeys(key[:2] for key in groups))
    heights = [max(len(r) for key, r in groups.items() if key[2] == op) + 1.5 for op in ops]
    figure = Figure(figsize=(6 * len(settings), 0.28 * sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(ops), len(settings), squeeze=False, sharex="row", height_ratios=heights)
    for (model, threads, op), group in groups.items():
        axes = grid[ops.index(op)][settings.index((model, threads))]
        group = sorted(group, key=lambda r: -r.median)
        medians = [r.median for r in group]
        errors = [[r.median - r.low for r in group], [r.high - r.median for r in group]]
        colors = [
            "tab:blue"
            if r.contestant.startswith("distruction")
            else "gray"
            if r.contestant in (TRIAD, COPY)
            else "silver"
            for r in group
        ]
        bars = axes.barh([r.contestant for r in group], medians, xerr=errors, color=colors)
        axes.bar_label(bars, [_three_digits(m) for m in medians], padding=4, fontsize=8)
        axes.set(xscale="log")
        axes.set_title(f"{op}, {model}, {_threads(threads)}", fontsize=10)
        axes.margins(x=0.25)
        axes.grid(alpha=0.3, axis="x")
    for axes in grid[-1]:
        axes.set_xlabel("ms: median, quantiles 0.2 and 0.8")
    figure.suptitle(device)
    figure.savefig(path, format="png", dpi=90)


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 1000 else f"{value:.3g}"


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def markdown(rows: Sequence[Row]) -> str:
    """The results as a table for the README: times, and ratios in the same run."""
    settings = list(dict.fromkeys((r.model, r.threads) for r in rows))
    formats = {
        "speed-up": ("speedup", ".3g"),
        "of the limit": ("of_limit", ".2f"),
        "launches": ("launches", "d"),
        "host ms": ("host", ".3g"),
        "peak MiB": ("peak", ".0f"),
    }
    columns = {k: v for k, v in formats.items() if any(getattr(r, v[0]) is not None for r in rows)}
    head = ["op", "contestant"]
    for model, threads in settings:
        head += [f"{model}, {_threads(threads)}: ms", *columns]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    cells = {(r.op, r.contestant, r.model, r.threads): r for r in rows}
    for op, contestant in dict.fromkeys((r.op, r.contestant) for r in rows):
        line = [op, contestant]
        for setting in settings:
            row = cells.get((op, contestant, *setting))
            line.append("-" if row is None else _three_digits(row.median))
            for field, form in columns.values():
                value = getattr(row, field, None)
                line.append("-" if value is None else format(value, form))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
