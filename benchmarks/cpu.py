"""The ops and the whole optimizer step on a CPU, beside their peers: ``python -m benchmarks.cpu``.

Writes ``cpu.json``, ``cpu.csv`` and ``cpu.png``. IVON takes part if ``ivon-opt`` is installed (extra ``bench``).
"""

import gc
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import contestants, harness
from .our_ops import Workload

RESULTS = Path(__file__).with_name("results")


def main(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
    model: Annotated[str, typer.Option(help=", ".join(contestants.MODELS))] = "ViT-B/16",
    threads: Annotated[list[int] | None, typer.Option(help="Host threads; repeatable.")] = None,
    op: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(contestants.OPS)}; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls of each contestant.")] = 25,
    budget: Annotated[float, typer.Option(help="Seconds after which a slow contestant sits out.")] = 20.0,
) -> None:
    """Time the ops of the C++ backend and their peers."""
    device = torch.device("cpu")
    workload = Workload(contestants.parameter_shapes(model), device)
    rows: list[harness.Row] = []
    for count in threads or (1, 2):
        torch.set_num_threads(count)
        for name in op or contestants.OPS:
            chosen = contestants.OPS[name]
            made = chosen.make(workload, ["cpp"])
            made[harness.TRIAD] = harness.triad(4 * chosen.arrays * workload.numel, device)
            with torch.no_grad():
                timings = harness.measure(made, harness.wall_time, rounds=rounds, budget=budget)
            of = harness.rows_of(
                timings,
                baseline=contestants.BASELINE,
                limit=harness.TRIAD,
                model=model,
                parameters=workload.numel,
                threads=count,
                op=name,
            )
            print(harness.markdown(of), flush=True)
            rows += of
            del made
            gc.collect()
    command = " ".join(["python -m benchmarks.cpu", *sys.argv[1:]])
    out.mkdir(parents=True, exist_ok=True)
    harness.write(out / "cpu", rows, {"command": command, **harness.environment(device)})


if __name__ == "__main__":
    typer.run(main)
