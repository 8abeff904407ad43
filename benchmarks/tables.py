"""Write the Markdown tables of a bench's committed results again, from its summary.csv.

``python -m benchmarks.tables benchmarks/results/digits benchmarks/results/fashion``

It prints the tables of docs/results.md: accuracy on retained and forgotten classes in each scenario.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from distruction import methods, scenarios
from distruction.experiments import tables


def overview(folder: Path) -> str:
    """D_r and D_f of all methods in all scenarios, as a Markdown table."""
    found = tables.read((folder / "summary.csv").read_text())
    kinds = [kind for kind in scenarios.NAMES if kind in found]
    head = [folder.name, "retain data", *(f"{kind}: {metric}" for kind in kinds for metric in ("D_r %", "D_f %"))]
    lines = [head, ["---", "---", *["---:"] * (2 * len(kinds))]]
    for method in found[kinds[0]]:
        line = [tables.title(method), methods.get(method).reads]
        for kind in kinds:
            for metric in ("retain", "forget"):
                summary = found[kind].get(method, {}).get(metric)
                # With s in the place of every seed's value, which would be too wide.
                line.append("–" if summary is None else tables.entry(replace(summary, values=()), 1))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(folders: Annotated[list[Path], typer.Argument(help="Folders with a summary.csv.")]) -> None:
    """Write the tables of each folder beside its summary.csv."""
    for folder in folders:
        for scenario, table in tables.read((folder / "summary.csv").read_text()).items():
            for name, (_, rows) in tables.forms(scenario, table).items():
                (folder / f"{scenario}-{name}.md").write_text(tables.markdown(rows))
        print(overview(folder))


if __name__ == "__main__":
    typer.run(main)
