"""What the Triton kernels may cost, asserted on the machine code of GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[1]

# The compiler of Triton 3.8; older ones (measured: 3.6) make a little more of the same kernels.
CURRENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
# Instructions per element and registers of the fp32 step with prior, KL and two draws, on sm_80 and sm_90. Three
# instructions choose the pull's nearer end, two keep lanes beyond the tensor's from what others store.
MOST_INSTRUCTIONS, MOST_REGISTERS = (115, 64) if CURRENT else (120, 64)
# Bytes per parameter: float32 arrays that the op has to read or write once, and bfloat16 parameters and gradients.
BYTES = {
    "sample": 4 * 3,
    "accumulate": 4 * 8,
    "accumulate, pair": 4 * 5,
    "step": 4 * 8,
    "step, unbounded": 4 * 8,
    "step, grad_scale and found_inf": 4 * 8,
    "step, pair": 4 * 9,
    "step, pair, codes of the prior": 4 * 8 + 1,
    "step, codes of the prior": 4 * 7 + 1,
    "step, codes beside bfloat16": 4 * 6 + 2 + 1,
    "step, K > 2": 4 * 10,
    "step, fixed mean": 4 * 7,
    "step without prior": 4 * 6,
    "step without prior, fixed mean": 4 * 5,
    "step, bfloat16": 4 * 6 + 2 * 2,
    "step, bfloat16, stochastic": 4 * 6 + 2 * 2,
    "gauss_newton": 4 * 5,
    "gauss_newton, grad_scale and found_inf": 4 * 5,
    "gauss_newton, bfloat16, stochastic": 4 * 3 + 2 * 2,
    "gaussian_kl": 4 * 6,
}
# Triton brings a linker for ROCm's code since 3.5.
LINKS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) or Path("/opt/rocm/llvm/bin/ld.lld").exists()
TARGETS = (
    "sm_80",
    "sm_90",
    "sm_100",
    pytest.param("gfx942", marks=pytest.mark.skipif(not LINKS, reason="Triton 3.4 links with ROCm's own linker")),
)


@pytest.fixture(scope="session")
def budgets(tmp_path_factory):
    # In a process of its own: here the kernels may be interpreted.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = tmp_path_factory.mktemp("budgets") / "budgets.json"
    command = [sys.executable, "-m", "benchmarks.budgets", "--json", str(path)]
    if not LINKS:
        command += [word for target in TARGETS[:3] for word in ("--target", target)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode and "comes without cuobjdump" in run.stderr:
        pytest.skip("this build of Triton comes without cuobjdump")
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    return {(b["variant"], b["target"]): b for b in json.loads(path.read_text())}


def test_every_kernel_is_compiled_for_every_target(budgets):
    targets = {*TARGETS[:3], "gfx942"} if LINKS else set(TARGETS[:3])
    assert set(budgets) == {(variant, target) for variant in BYTES for target in targets}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", BYTES)
def test_one_read_and_one_write_of_each_array_in_wide_accesses(budgets, variant, target):
    budget = budgets[variant, target]
    assert budget["bytes"] == BYTES[variant]
    # Four elements per thread: 16 bytes of float32, 8 of bfloat16, 4 of codes.
    narrow = [width for width, what in ((32, "codes"), (64, "bfloat16")) if what in variant]
    assert budget["widths"] == [*narrow, 128]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", BYTES)
def test_nothing_is_spilled_or_passes_through_shared_memory(budgets, variant, target):
    assert budgets[variant, target]["spilled"] == 0
    assert budgets[variant, target]["barriers"] == 0


@pytest.mark.parametrize(
    ("variant", "target"),
    [
        ("step", "sm_80"),
        ("step", "sm_90"),
        ("step, fixed mean", "sm_80"),
        ("step, fixed mean", "sm_90"),
        ("step, grad_scale and found_inf", "sm_90"),
    ],
)
def test_the_step(budgets, variant, target):
    assert budgets[variant, target]["instructions"] <= MOST_INSTRUCTIONS
    assert budgets[variant, target]["registers"] <= MOST_REGISTERS


@pytest.mark.parametrize("target", TARGETS)
def test_the_other_kernels_cost_little_more_than_the_step_may(budgets, target):
    # The unbounded rule takes a division more, K > 1 two more arrays, bfloat16 its conversions (gfx942: 13 in all).
    for variant in BYTES:
        # Of a code: conversions, six products and sums, the exponent, and an eighth of the look-ups.
        most = (1.12 if CURRENT else 1.15) * MOST_INSTRUCTIONS + (25 if "codes" in variant else 0)
        assert budgets[variant, target]["instructions"] <= most, variant
    assert budgets["step without prior", target]["instructions"] <= 95
    assert budgets["sample", target]["instructions"] <= 40
    for variant in BYTES:
        if variant.startswith("gauss_newton"):
            assert budgets[variant, target]["instructions"] <= 60, variant


@pytest.mark.parametrize("target", TARGETS)
def test_registers_leave_room_for_other_programs(budgets, target):
    # 512 registers of a lane of gfx942 and 65,536 of an SM leave at least four waves or warps per scheduler.
    most = 128 if target == "gfx942" else 72 if CURRENT else 96
    assert all(budgets[v, target]["registers"] <= most for v in BYTES)
