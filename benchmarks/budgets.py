"""What the Triton kernels cost, read off the machine code: ``python -m benchmarks.budgets``.

Each kernel is compiled, for GPUs that need not be there, exactly as it is launched for aligned tensors, and its main
loop is examined: the instructions of an iteration handle four elements per thread.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import triton
import triton.language as tl
import typer
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from distruction.kernels import tables
from distruction.kernels.gauss_newton import gauss_newton_kernel
from distruction.kernels.kl import gaussian_kl_kernel
from distruction.kernels.philox import KEYS
from distruction.kernels.sample import sample_kernel
from distruction.kernels.step import accumulate_kernel, step_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ELEMENTS_PER_THREAD = 4

_STEP = {
    "PARAM_TYPE": tl.float32,
    "GRAD_TYPE": tl.float32,
    "PRIOR": 1,
    "PRIOR_TYPE": tl.float32,
    "STATISTICS": 0,
    "BOUNDED": True,
    "LEARN_MEAN": True,
    "LEARN_STD": True,
    "ANTITHETIC": True,
    "STOCHASTIC": False,
    "grad_scale": None,
    "found_inf": None,
}
_CODES = {"PRIOR": 2}
_BFLOAT16 = {"PARAM_TYPE": tl.bfloat16, "GRAD_TYPE": tl.bfloat16}


@dataclass(frozen=True)
class Variant:
    """A kernel with its compile-time options.

    Attributes:
        bytes: per element, of the arrays that it must read or write once each.
        same: bytes per element of a thread's accesses beyond those: of two numbers that all threads of a program read,
            and that come from the cache.
    """

    kernel: Any
    options: dict[str, Any]
    bytes: int
    same: int = 0


def _options(kernel: Any, *given: str) -> dict[str, Any]:
    """The options of the step that ``kernel`` has too; the arguments ``given`` are pointers instead."""
    return {k: v for k, v in _STEP.items() if k in kernel.arg_names and k not in given}


VARIANTS = {
    "sample": Variant(sample_kernel, {"PARAM_TYPE": tl.float32, "ANTITHETIC": True, "STOCHASTIC": False}, 12),
    "accumulate": Variant(accumulate_kernel, {**_options(accumulate_kernel), "STATISTICS": 2}, 32),
    "accumulate, pair": Variant(accumulate_kernel, {**_options(accumulate_kernel), "STATISTICS": 1}, 20),
    "step": Variant(step_kernel, _STEP, 32),
    "step, unbounded": Variant(step_kernel, {**_STEP, "BOUNDED": False}, 32),
    "step, grad_scale and found_inf": Variant(step_kernel, _options(step_kernel, "grad_scale", "found_inf"), 32),
    "step, pair": Variant(step_kernel, {**_STEP, "STATISTICS": 1}, 36),
    "step, pair, codes of the prior": Variant(step_kernel, {**_STEP, **_CODES, "STATISTICS": 1}, 33, same=2),
    "step, codes of the prior": Variant(step_kernel, {**_STEP, **_CODES}, 29, same=2),
    "step, codes beside bfloat16": Variant(step_kernel, {**_STEP, **_CODES, "PRIOR_TYPE": tl.bfloat16}, 27, same=2),
    "step, K > 2": Variant(step_kernel, {**_STEP, "STATISTICS": 2}, 40),
    "step, fixed mean": Variant(step_kernel, {**_STEP, "LEARN_MEAN": False}, 28),
    "step without prior": Variant(step_kernel, {**_STEP, "PRIOR": 0}, 24),
    "step without prior, fixed mean": Variant(step_kernel, {**_STEP, "PRIOR": 0, "LEARN_MEAN": False}, 20),
    "step, bfloat16": Variant(step_kernel, {**_STEP, **_BFLOAT16}, 28),
    "step, bfloat16, stochastic": Variant(step_kernel, {**_STEP, **_BFLOAT16, "STOCHASTIC": True}, 28),
    "gauss_newton": Variant(gauss_newton_kernel, _options(gauss_newton_kernel), 20),
    "gauss_newton, grad_scale and found_inf": Variant(
        gauss_newton_kernel, _options(gauss_newton_kernel, "grad_scale", "found_inf"), 20
    ),
    "gauss_newton, bfloat16, stochastic": Variant(
        gauss_newton_kernel, {**_options(gauss_newton_kernel), **_BFLOAT16, "STOCHASTIC": True}, 16
    ),
    "gaussian_kl": Variant(gaussian_kl_kernel, {}, 24),
}
"""What is compiled: the ops, and the options of the updates one by one."""

UPDATES = {
    "update of two samples with prior, in pairs": ("accumulate, pair", "step, pair"),
    "the same, prior in codes": ("accumulate, pair", "step, pair, codes of the prior"),
    "the same, by sums": ("accumulate", "step, K > 2"),
}
"""The calls of BGD's default update."""

_POINTERS = {
    "records": "*i64",
    "tensor_of_chunk": "*i32",
    "fresh": "*i64",
    "counters": "*i64",
    "lr": "*fp32",
    "kl_weight": "*fp32",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
    "partial": "*fp64",
}
_SCALARS = {"chunk": "i32", "tensors": "i32", **dict.fromkeys(KEYS, "i32")}


@dataclass(frozen=True)
class Budget:
    """What one variant costs on one target.

    Attributes:
        registers: per thread.
        spilled: bytes of stack per thread.
        instructions: per element: an iteration's, and the rest of the program over the elements of a full one.
        bytes: per element, moved by an iteration between global memory and registers, but for `Variant.same`.
        widths: bits of the loop's global accesses, per thread.
        barriers: in the loop: something passes through shared memory.
    """

    variant: str
    target: str
    registers: int
    spilled: int
    instructions: float
    bytes: float
    widths: tuple[int, ...]
    barriers: int


def compile_variant(variant: Variant, target: GPUTarget) -> CompiledKernel:
    """Compile as `distruction.kernels` launches it for aligned tensors."""
    options = {
        **variant.options,
        "ALIGNED": True,
        "BLOCK": tables.BLOCKS[target.backend],
        "TARGET": target.backend,
    }
    names = variant.kernel.arg_names
    types = {n: "constexpr" if n in options else {**_POINTERS, **_SCALARS}.get(n, "fp32") for n in names}
    # The tables' base addresses are specialised for alignment, as at run time; the other arguments are not.
    attributes = {
        (names.index(n),): [["tt.divisibility", 16]] for n in ("records", "tensor_of_chunk", "fresh") if n in names
    }
    source = ASTSource(variant.kernel, types, options, attributes)
    return triton.compile(source, target=target, options=tables.LAUNCH)


# --- NVIDIA ------------------------------------------------------------------------------------------


def _tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: this build of Triton comes without {name}; the wheels have it")
    return str(path)


def sass_of(kernel: CompiledKernel) -> tuple[str, str]:
    """The machine code and its resources, as ``cuobjdump`` prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = [_tool("cuobjdump"), file.name]
        sass = subprocess.run([*run, "-sass"], capture_output=True, text=True, check=True).stdout
        resources = subprocess.run([*run, "-res-usage"], capture_output=True, text=True, check=True).stdout
    return sass, resources


def _nvidia(name: str, target: str, kernel: CompiledKernel) -> Budget:
    sass, resources = sass_of(kernel)
    code = [
        (int(address, 16), opcode, operands)
        for address, opcode, operands in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", sass
        )
        if opcode != "NOP"
    ]
    jumps = [
        (int(to.group(1), 16), address)
        for address, opcode, operands in code
        if opcode.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", operands))
    ]
    # The last instruction is a jump to itself that is never reached.
    ((start, end),) = [(to, address) for to, address in jumps if to < address]
    loop = [opcode for address, opcode, _ in code if start <= address <= end]
    widths = [
        int(width.group(1)) if (width := re.search(r"\.(64|128|U16|U8)\b", opcode.replace("U", ""))) else 32
        for opcode in loop
        if re.match(r"LDG|STG", opcode)
    ]
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", resources))
    return _budget(
        name,
        target,
        registers=int(found["REG"]),
        spilled=int(found["STACK"]) + int(found["LOCAL"]),
        in_loop=len(loop),
        outside=len(code) - len(loop),
        widths=widths,
        barriers=sum(opcode.startswith(("BAR", "LDS", "STS")) for opcode in loop),
    )


# --- AMD ---------------------------------------------------------------------------------------------

_AMD_WIDTHS = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}


def _amd(name: str, target: str, kernel: CompiledKernel) -> Budget:
    assembly = kernel.asm["amdgcn"]
    body = assembly[: assembly.index("s_endpgm")].splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(body) if re.match(r"\.LBB\w+:", line)}
    backward = [
        (labels[label.group(1)], i)
        for i, line in enumerate(body)
        if (label := re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)) and labels.get(label.group(1), i) < i
    ]
    # One loop, whose blocks are not in order.
    start, end = min(to for to, _ in backward), max(line for _, line in backward)
    opcodes = [match.group(1) if (match := re.match(r"\s+([vs]_\w+|global_\w+|ds_\w+)", line)) else "" for line in body]
    loop = [o for o in opcodes[start : end + 1] if o]
    widths = [_AMD_WIDTHS[o.split("_")[2]] for o in loop if o.startswith(("global_load", "global_store"))]
    return _budget(
        name,
        target,
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", assembly).group(1)),  # type: ignore[union-attr]
        spilled=int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly).group(1)),  # type: ignore[union-attr]
        in_loop=len(loop),
        outside=sum(map(bool, opcodes)) - len(loop),
        widths=widths,
        barriers=sum(o.startswith(("s_barrier", "ds_")) for o in loop),
    )


def _budget(
    name: str,
    target: str,
    *,
    registers: int,
    spilled: int,
    in_loop: int,
    outside: int,
    widths: list[int],
    barriers: int,
) -> Budget:
    per_iteration = in_loop + outside / tables.MOST_ITERATIONS
    return Budget(
        name,
        target,
        registers,
        spilled,
        round(per_iteration / ELEMENTS_PER_THREAD, 1),
        sum(widths) / 8 / ELEMENTS_PER_THREAD - VARIANTS[name].same,
        tuple(sorted(set(widths))),
        barriers,
    )


def measure(variants: Sequence[str] = tuple(VARIANTS), targets: Sequence[str] = tuple(TARGETS)) -> list[Budget]:
    """Compile and examine ``variants`` for ``targets``."""
    budgets = []
    for target in targets:
        for name in variants:
            kernel = compile_variant(VARIANTS[name], TARGETS[target])
            examine = _amd if TARGETS[target].backend == "hip" else _nvidia
            budgets.append(examine(name, target, kernel))
    return budgets


def with_updates(budgets: Sequence[Budget]) -> list[Budget]:
    """The budgets, and of `UPDATES` whose kernels are among them the sums, with the most registers of any."""
    found = {(b.variant, b.target): b for b in budgets}
    updates = []
    for name, target in itertools.product(UPDATES, dict.fromkeys(b.target for b in budgets)):
        parts = [found[variant, target] for variant in UPDATES[name] if (variant, target) in found]
        if len(parts) == len(UPDATES[name]):
            instructions, moved = sum(b.instructions for b in parts), sum(b.bytes for b in parts)
            most = max(b.registers for b in parts)
            summed = replace(parts[0], variant=name, registers=most, instructions=instructions, bytes=moved)
            updates.append(summed)
    return [*budgets, *updates]


def markdown(budgets: Sequence[Budget], before: Sequence[Budget] = ()) -> str:
    """The budgets as a table: instructions per element and registers by target; in brackets those of ``before``."""
    targets = list(dict.fromkeys(b.target for b in budgets))
    head = ["kernel", "bytes/element", *(f"{t}: instr./element, registers" for t in targets)]
    lines = [head, ["---", "---:", *["---:"] * len(targets)]]
    old = {(b.variant, b.target): f" ({b.instructions:.1f}, {b.registers})" for b in with_updates(before)}
    rows: dict[str, dict[str, str]] = {}
    for b in with_updates(budgets):
        cells = rows.setdefault(b.variant, {"bytes": f"{b.bytes:g}"})
        cells[b.target] = f"{b.instructions:.1f}, {b.registers}{old.get((b.variant, b.target), '')}"
    lines += [[name, *(cells.get(column, "-") for column in ("bytes", *targets))] for name, cells in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def read(file: Path) -> list[Budget]:
    """The budgets that ``--json`` wrote."""
    return [Budget(**{**entry, "widths": tuple(entry["widths"])}) for entry in json.loads(file.read_text())]


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file too.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"Of {'; '.join(VARIANTS)}; repeatable.")] = None,
    target: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TARGETS)}; repeatable.")] = None,
    before: Annotated[Path | None, typer.Option(help="An older version's --json, to give in brackets.")] = None,
) -> None:
    """Print what the kernels cost per element."""
    if tables.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: there is no machine code; unset it")
    budgets = measure(variant or tuple(VARIANTS), target or tuple(TARGETS))
    if json_file:
        json_file.write_text(json.dumps([asdict(b) for b in budgets], indent=1) + "\n")
    print(markdown(budgets, [] if before is None else read(before)), end="")


if __name__ == "__main__":
    typer.run(main)
