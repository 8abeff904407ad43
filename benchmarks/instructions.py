"""Instructions per element of the CPU kernels, counted by callgrind: ``python -m benchmarks.instructions``.

Counts say the same whatever else a machine does. They are of AVX2 code, which valgrind knows; a difference of two sizes
leaves out what a call costs. Writes ``instructions.json``.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from distruction.files import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "costs" / "instructions.json"
SIZES = (2**14, 2**15)

CASES = {
    "sample": ("sample", 1, ""),
    "accumulate, first sample": ("accumulate", 0, "12"),
    "accumulate, another": ("accumulate", 1, "12"),
    "accumulate, pair": ("accumulate", 0, "1"),
    "step": ("step", 1, "p"),
    "step, pair": ("step", 1, "p1"),
    "step, pair, codes of the prior": ("step", 1, "c1"),
    "step, sums": ("step", 1, "p12"),
    "step without prior": ("step", 1, ""),
    "gauss_newton": ("gauss_newton", 1, ""),
    "gaussian_kl": ("gaussian_kl", 1, "p"),
}
"""What is called: the op, the draw (of a pair, 0 or 1), the arrays beside mean and std."""

UPDATES = {"in pairs": ("accumulate, pair", "step, pair"), "by sums": ("accumulate, first sample", "step, sums")}
"""The calls of an update of two antithetic samples with a prior, BGD's default."""

PARTS = {"generate": "normals", "update_piece": "update and sample", "kl_piece": "KL", "mirror_piece": "first half"}
"""What an update's instructions are spent on, by the functions of csrc/cpu/vectorised.h."""


def compiler() -> str | None:
    """The C++ compiler's name and version, ``None`` where there is none."""
    if shutil.which("g++") is None:
        return None
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def missing() -> str | None:
    """What counting needs and this machine lacks."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    return "there is no g++" if compiler() is None else None


def build(source: Path, folder: Path) -> Path:
    """The program that makes one call."""
    program = folder / "instructions"
    command = ["g++", "-std=c++17", "-O1", f"-I{source / 'csrc'}", str(Path(__file__).with_suffix(".cpp")), "-ldl"]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def count(program: Path, library: Path, case: str, elements: int, out: Path = Path("/dev/null")) -> int:
    """Instructions of one call; callgrind writes its own account to ``out``."""
    op, draw, arrays = CASES[case]
    counting = [
        "valgrind",
        "--tool=callgrind",
        f"--callgrind-out-file={out}",
        f"--toggle-collect=distruction_cpu_{op}",
    ]
    call = [str(program), str(library), op, "avx2", str(elements), str(draw), arrays]
    run = subprocess.run([*counting, *call], capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", run.stderr)
    assert found is not None, run.stderr
    return int(found.group(1))


def parts(source: Path = ROOT) -> dict[str, float]:
    """Instructions per element of an update in pairs, by `PARTS` and the rest."""
    library = source / "distruction" / "ops" / "libdistruction_cpu.so"
    found = dict.fromkeys([*PARTS.values(), "rest"], 0.0)
    with tempfile.TemporaryDirectory() as folder:
        program, out = build(source, Path(folder)), Path(folder) / "counts"
        for case in UPDATES["in pairs"]:
            for elements, sign in zip(SIZES, (-1, 1), strict=True):
                count(program, library, case, elements, out)
                read = ["callgrind_annotate", "--threshold=100", str(out)]
                lines = subprocess.run(read, capture_output=True, text=True, check=True).stdout
                for instructions, function in re.findall(r"^ *([\d,]+) \([^)]*\) +\S*?:(.*) \[", lines, re.MULTILINE):
                    part = next((part for name, part in PARTS.items() if re.search(rf"::{name}[<(]", function)), "rest")
                    found[part] += sign * int(instructions.replace(",", "")) / (SIZES[1] - SIZES[0])
    return {part: round(value, 2) for part, value in found.items()}


def measure(source: Path = ROOT) -> dict[str, float]:
    """Instructions per element of every case that the source has, and of an update."""
    library = source / "distruction" / "ops" / "libdistruction_cpu.so"
    headers = "".join(header.read_text() for header in (source / "csrc").glob("*.h"))
    new = "Statistics" in headers
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = build(source, Path(folder))
        for case, (op, _, arrays) in CASES.items():
            if not new and (arrays in ("1", "p1") or op == "gauss_newton"):
                continue
            if "c" in arrays and "prior_codes" not in headers:
                continue
            few, many = (count(program, library, case, n) for n in SIZES)
            found[case] = round((many - few) / (SIZES[1] - SIZES[0]), 2)
    for name, cases in UPDATES.items():
        if all(case in found for case in cases):
            found[f"update of two samples, {name}"] = round(sum(found[case] for case in cases), 2)
    return found


def main(
    out: Annotated[Path, typer.Option(help="File to write.")] = RESULTS,
    before: Annotated[Path | None, typer.Option(help="An older checkout, built in place, to compare with.")] = None,
) -> None:
    """Count the instructions of the C++ backend's AVX2 code."""
    if (reason := missing()) is not None:
        sys.exit(reason)
    now = measure()
    then = {} if before is None else measure(before)
    if before is None and out.exists():
        then = json.loads(out.read_text())["before"]
    print("| call | before | now |\n|---|--:|--:|")
    for name, value in now.items():
        print(f"| {name} | {then.get(name, '')} | {value} |")
    of_update = parts()
    print("\nOf an update of two samples, in pairs:", ", ".join(f"{part} {value}" for part, value in of_update.items()))
    result = {
        "compiler": compiler(),
        "instructions per element": now,
        "parts of an update of two samples, in pairs": of_update,
        "before": then,
    }

    def write(name: str) -> None:
        Path(name).write_text(json.dumps(result, indent=1) + "\n")

    write_atomically(out, write)


if __name__ == "__main__":
    typer.run(main)
