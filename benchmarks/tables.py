"""Write the Markdown tables of a bench's committed results again, from its summary.csv.

python -m benchmarks.tables benchmarks/results/digits benchmarks/results/fashion
"""

from pathlib import Path
from typing import Annotated

import typer

from distruction.experiments import tables


def main(folders: Annotated[list[Path], typer.Argument(help="Folders with a summary.csv.")]) -> None:
    """Write the tables of each folder beside its summary.csv."""
    for folder in folders:
        for scenario, table in tables.read((folder / "summary.csv").read_text()).items():
            for name, (_, rows) in tables.forms(scenario, table).items():
                (folder / f"{scenario}-{name}.md").write_text(tables.markdown(rows))


if __name__ == "__main__":
    typer.run(main)
