"""``distruction bench``: the paper's experiments."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .. import experiments, ops
from ..errors import UsageError
from .options import Backend, DataRoot, Pretrained, Progress, SkipUnreadable, alone, check_root, device_of

LANGUAGE = "language"
"""The preset that is no grid of classifiers."""


def bench(
    preset: Annotated[str | None, typer.Option(help=", ".join((*experiments.PRESETS, LANGUAGE)))] = None,
    grid: Annotated[Path | None, typer.Option(help="TOML file of scenarios, methods and seeds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/bench/NAME.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where results are kept; default OUT/store.")] = None,
    data: DataRoot = None,
    pretrained: Pretrained = None,
    device: Annotated[str, typer.Option(help="Devices, with commas; auto takes every GPU or the CPU.")] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, max=1024, help="Processes per device; 0: one per GPU or CPU core.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, max=4096, help="CPU threads of each process.")] = 1,
    skip_unreadable: SkipUnreadable = False,
    backend: Backend = "auto",
    progress: Progress = True,
) -> None:
    """Run the paper's experiments: scenarios x methods x seeds. Start it again to resume."""
    alone("bench")
    if (preset is None) == (grid is None):
        raise UsageError(f"pass either --preset ({', '.join((*experiments.PRESETS, LANGUAGE))}) or --grid FILE.toml")
    if "" in (str(out or "x").strip(". "), str(store or "x").strip(". ")):
        raise UsageError("--out and --store must name a folder of their own")
    if preset == LANGUAGE:
        others = {"data": data, "pretrained": pretrained, "device": device.replace("cpu", "auto"), "backend": backend}
        if unused := [f"--{name}" for name, value in others.items() if value not in (None, "auto")]:
            raise UsageError(f"{', '.join(unused)} is for presets of classifiers: --preset {LANGUAGE} runs on the CPU")
        _of_language(out, store, workers, threads)
        return
    experiment = experiments.preset(preset) if preset else experiments.read(grid or Path())
    if all(scenario.data == "digits" for scenario in experiment.scenarios):
        check_root("digits", data)
    out = out or Path("runs/bench") / (preset or Path(grid or "").stem)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = gpus or ["cpu"] if device == "auto" else [str(device_of(name)) for name in device.split(",")]
    for name in devices:
        ops.resolve(backend, torch.device(name).type)
    each = workers or (1 if devices != ["cpu"] else os.cpu_count() or 1)
    _, outcome = experiments.run(
        experiment,
        out,
        experiments.Context(store or out / "store", data, pretrained, backend=backend, skip_unreadable=skip_unreadable),
        devices=devices * each,
        threads=threads,
        command=shlex.join(["distruction", *sys.argv[1:]]),
        progress=progress,
    )
    console = Console()
    console.print(f"{outcome.done} jobs done, {outcome.reused} found finished; report: {out / 'report' / 'index.html'}")
    for title, message in outcome.failures.values():
        console.print(f"failed: {title}: {message.splitlines()[-1]}", style="red", markup=False)
    if outcome.failures:
        raise typer.Exit(1)


def _of_language(out: Path | None, store: Path | None, workers: int, threads: int) -> None:
    from ..experiments import language

    out = out or Path("runs/bench") / LANGUAGE
    language.run(out, store or out / "store", workers=workers, threads=threads)
    print(f"tables, figure and all runs: {out}")
