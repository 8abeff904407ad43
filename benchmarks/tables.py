"""Write the Markdown tables of a bench's committed results again, from its summary.csv.

python -m benchmarks.tables benchmarks/results/digits benchmarks/results/fashion
"""

import sys
from pathlib import Path

from distruction.bench import tables


def main(folders: list[str]) -> None:
    """Write the tables of each folder beside its summary.csv."""
    for folder in map(Path, folders):
        for scenario, table in tables.read((folder / "summary.csv").read_text()).items():
            for name, (_, rows) in tables.forms(scenario, table).items():
                (folder / f"{scenario}-{name}.md").write_text(tables.markdown(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
