"""Time of an optimizer's default update beside an older checkout's: ``python -m benchmarks.update FOLDER``.

Two antithetic samples with a prior, of 33 M parameters in the shapes of a ViT-B's layers, on one thread. A process of
each version makes one update in turn, so that what else the machine does disturbs both; several processes, since where
their arrays lie in memory matters too. Writes ``update.json``.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import environment
from distruction.files import write_atomically
from distruction.ops import cpp

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "costs" / "update.json"

WORKER = """
import itertools, sys, time, torch
from distruction import BGD, Posterior
torch.set_num_threads(1)
torch.manual_seed(0)
params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in [(768, 768)] * 24 + [(3072, 768)] * 8]
for p in params:
    p.grad = 1e-3 * torch.randn_like(p)
names = [str(i) for i in range(len(params))]
means, stds = [p.detach().clone() for p in params], [torch.full_like(p, 0.02) for p in params]
prior = Posterior(dict(zip(names, means)), dict(zip(names, stds)))
opt = BGD(zip(names, params), std_init=prior, prior=prior, kl_weight=0.1, mc_samples=2)
opt.train()
for line in itertools.chain(["warm", "up"], sys.stdin):
    start = time.process_time()
    opt.step()
    opt.step()
    print(time.process_time() - start, flush=True)
"""
"""What either version runs: a line of its input asks for an update, a line of its output is the update's seconds."""


class Process:
    """A version of the package that waits to make updates."""

    def __init__(self, root: Path, instruction_set: str) -> None:
        variables = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", cpp.ENVIRONMENT: instruction_set}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-c", WORKER], cwd=root, env=os.environ | variables, **pipes)

    def warm_up(self) -> None:
        """Wait for the updates that the worker makes unasked."""
        for _ in range(2):
            self._answer()

    def update(self) -> float:
        """Seconds of an update."""
        assert self._process.stdin is not None
        self._process.stdin.write("update\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        return float(self._process.stdout.readline())


def measure(before: Path, instruction_set: str, rounds: int, restarts: int) -> dict[str, Any]:
    """Seconds of both versions, and the medians of their ratios: of all pairs, and of each restart's."""
    pairs: list[list[tuple[float, float]]] = []
    for _ in range(restarts):
        old, new = Process(before, instruction_set), Process(ROOT, instruction_set)
        for process in (old, new):
            process.warm_up()
        pairs.append([])
        for i in range(rounds):
            seconds = {process: process.update() for process in ((old, new) if i % 2 else (new, old))}
            pairs[-1].append((seconds[old], seconds[new]))
        old.end()
        new.end()
    every = [pair for some in pairs for pair in some]
    return {
        "pairs": len(every),
        "before, ms": round(1e3 * statistics.median(a for a, _ in every), 1),
        "now, ms": round(1e3 * statistics.median(b for _, b in every), 1),
        "now / before": round(statistics.median(b / a for a, b in every), 3),
        "of each restart": [round(statistics.median(b / a for a, b in some), 3) for some in pairs],
    }


def main(
    before: Annotated[Path, typer.Argument(help="The older checkout, built in place.")],
    rounds: Annotated[int, typer.Option(help="Updates of each version by a process.")] = 21,
    restarts: Annotated[int, typer.Option(help="Processes of each version, one after another.")] = 2,
    out: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
) -> None:
    """Time the C++ backend's vector instruction sets that this CPU has."""
    found = {
        name: measure(before.resolve(), name, rounds, restarts)
        for name, (_, usable) in cpp.instruction_sets().items()
        if usable and name in ("avx512", "avx2")
    }
    for name, values in found.items():
        print(name, values)
    result = {"environment": environment(torch.device("cpu")), **found}

    def write(name: str) -> None:
        Path(name).write_text(json.dumps(result, indent=1) + "\n")

    write_atomically(out, write)


if __name__ == "__main__":
    typer.run(main)
