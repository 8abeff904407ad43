"""``distruction demo``: the main job."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .. import demo as demos
from .. import report
from .options import SEEDS, Backend, Overwrite, Progress, alone


def demo(
    out: Annotated[Path, typer.Option(help="Report folder to write.")] = Path("runs/demo"),
    forget_class: Annotated[
        list[str], typer.Option("--class", help="Digit to forget; repeat it for several, one at a time.")
    ] = ["3"],  # noqa: B006
    ablations: Annotated[bool, typer.Option(help="Also with a constant std and with a diagonal Fisher std.")] = False,
    seed: Annotated[
        list[int], typer.Option(min=0, max=SEEDS, help="Seed of everything that is drawn; may be repeated.")
    ] = [0],  # noqa: B006
    backend: Backend = "auto",
    progress: Progress = True,
    overwrite: Overwrite = False,
) -> None:
    """The main job on scikit-learn's digits: train, prepare, forget one class, compare with retraining."""
    alone("demo")
    runs = demos.run_demo(
        out,
        classes=forget_class,
        seeds=seed,
        overwrite=overwrite,
        ablations=ablations,
        backend=backend,
        progress=progress,
    )
    title = f"digits, class {', '.join(forget_class)} forgotten, seed {', '.join(map(str, seed))}"
    rows = demos.summary(runs) if len(runs) > 1 else runs[0].rows
    console = Console()
    spent = demos.phases(runs)
    for phase, seconds in spent.items():
        console.print(f"{seconds / sum(spent.values()):4.0%}  {seconds:7.1f} s  {phase}", highlight=False)
    console.print(report.table(title, rows, demos.COLUMNS))
    if len(runs) > 1:
        worst = max(runs, key=lambda r: r.loss_of_retained)
        console.print(
            f"mean and standard deviation s (n - 1) of {len(runs)} runs; DiStruction's largest loss of D_r in one run: "
            f"{worst.loss_of_retained:.1f} points (class {worst.forget_class}, seed {worst.seed})"
        )
    console.print(f"report: {out}")
