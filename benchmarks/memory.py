"""The table of docs/memory.md, computed by `distruction.planning`: ``python -m benchmarks.memory`` writes it there."""

from pathlib import Path
from typing import Any

import typer

from distruction.files import write_atomically
from distruction.planning import Plan, plan

RESULTS = Path(__file__).parent / "results" / "memory"
PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
BEGIN, END = "<!-- table: python -m benchmarks.memory -->\n", "<!-- end of table -->\n"
MODEL = "vit_large_patch16_224"
RUNS: dict[str, dict[str, Any]] = {
    "float32 (the defaults)": {},
    "K = 2": {"mc_samples": 2},
    "`release_gradients=True`": {"release_gradients": True},
    "std of the prior in bfloat16": {"prior_std": "bfloat16"},
    "prior `compress()`-ed (std as 8-bit codes)": {"prior_std": "log8"},
    'prior `compress(mean="bfloat16")`-ed': {"prior_std": "log8", "prior_mean": "bfloat16"},
    "`offload_prior=True` (device's memory)": {"offload_prior": True, "device": "cuda"},
    "parameters in bfloat16": {"dtype": "bfloat16"},
    "parameters in bfloat16, released, prior offloaded": {
        "dtype": "bfloat16",
        "release_gradients": True,
        "offload_prior": True,
        "device": "cuda",
    },
}


def row(title: str, found: Plan) -> str:
    """What lives for the length of a phase, in bytes per parameter, and the peak of a batch of one."""
    n = found.parameters
    kinds = ("parameters", "posterior", "statistics", "prior")
    forgetting = found.phases[1]
    cells = [sum(v for k, v in forgetting.resident.items() if k.startswith(kind)) / n for kind in kinds]
    cells.insert(1, forgetting.gradients / n)
    sums = [(sum(p.resident.values()) + p.gradients) / n for p in found.phases]
    peaks = [f"{p.peak / 2**30:.1f}" for p in found.phases]
    return " | ".join([f"| {title}", *(f"{c:.2f}".rstrip("0").rstrip(".") for c in [*cells, *sums]), *peaks]) + " |\n"


def table() -> str:
    """The table, in Markdown."""
    numbers = ["parameters", "gradients", "mean and std", "m1 and m2", "prior"]
    numbers += ["prepare", "forget", "GiB prepare", "GiB forget"]
    head = f"| options | {' | '.join(numbers)} |\n|---|{'--:|' * len(numbers)}\n"
    return head + "".join(row(title, plan(MODEL, (3, 224, 224), batch_size=1, **run)) for title, run in RUNS.items())


def main() -> None:
    """Write the table into the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page = before + BEGIN + table() + END + after

    def write(name: str) -> None:
        Path(name).write_text(page)

    write_atomically(PAGE, write)


if __name__ == "__main__":
    typer.run(main)
