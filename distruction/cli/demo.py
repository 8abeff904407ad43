"""``distruction demo``: the main job."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
    from ..experiments import demo as demos
    from ..experiments import results, tables

    alone("demo")
    found = demos.run(
        out,
        classes=forget_class,
        seeds=seed,
        overwrite=overwrite,
        ablations=ablations,
        backend=backend,
        progress=progress,
    )
    console = Console()
    spent = found.phases
    for phase, seconds in spent.items():
        console.print(f"{seconds / sum(spent.values()):4.0%}  {seconds:7.1f} s  {phase}", highlight=False)
    title = f"digits, class {', '.join(forget_class)} forgotten, seed {', '.join(map(str, seed))}"
    (table,) = results.tables(found.cells).values()
    console.print(report.lines(title, tables.by_metric(table, demos.COLUMNS)))
    runs = len(forget_class) * len(seed)
    if runs > 1:
        loss, worst, worst_seed = found.loss_of_retained()
        console.print(
            f"means over the classes, of several seeds with (each seed's), of more than {results.SHOWN} with ± half "
            f"their 95 % interval; DiStruction's largest loss of D_r in one of {runs} runs: {loss:.1f} points "
            f"(class {worst}, seed {worst_seed})"
        )
    console.print(f"report: {out}")
