"""``python -m benchmarks.language OUT``: the preset ``language`` of ``distruction bench`` in parts.

One seed or scenario, another size, step sizes tried on seed 0 (``--tune``), and a page's tables made anew.
"""

from pathlib import Path
from typing import Annotated

import typer

from distruction.experiments import language
from distruction.experiments.language import models, tables
from distruction.files import write_text


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    seed: Annotated[list[int], typer.Option()] = list(language.SEEDS),  # noqa: B006
    scenario: Annotated[list[str], typer.Option(help=f"Of {', '.join(language.SCENARIOS)}.")] = list(  # noqa: B006
        language.SCENARIOS
    ),
    text: Annotated[Path | None, typer.Option(help="General text, in place of Python's own.")] = None,
    models_in: Annotated[
        Path | None, typer.Option(help="Folder of trained models; default runs/language-SIZE.")
    ] = None,
    tuning: Annotated[bool, typer.Option("--tune", help="Try the step sizes on seed 0.")] = False,
    size: Annotated[str, typer.Option(help=f"Of {', '.join(models.SIZES)}.")] = "full",
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Processes; 0: one per CPU core.")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=4096, help="CPU threads of each process.")] = 1,
    page: Annotated[Path | None, typer.Option(help="Whose tables are made anew: docs/language.md.")] = None,
) -> None:
    """Run what is missing and write ``language.json``, ``language.md`` and ``language.png``."""
    folder = models_in or Path("runs") / f"language-{size}"
    runs = language.run(
        out,
        folder,
        seeds=seed,
        scenarios=scenario,
        text=text,
        size=size,
        workers=workers,
        threads=threads,
        tuning=tuning,
    )
    if page is not None:
        write_text(page, tables.on_page(page.read_text(encoding="utf-8"), runs))
    print(tables.table(runs))


if __name__ == "__main__":
    typer.run(main)
