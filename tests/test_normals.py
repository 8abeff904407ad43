"""The contract of the normals, |eps - exact| <= 4e-6 * max(1, |eps|), for every pair of words and every backend.

The pairs are 2**64, but a normal is a radius R of the one word times a cosine or sine of the other, and 32-bit words
make far fewer floats. With r, c exact and R the normal computed where the cosine is 1,

    |ours - r c| <= |ours - R c| + |c| |R - r|.

The second term, relative to max(1, |r c|), is at most what it is at c = 1; the first grows with R. So two scans, every
radius at cosine 1 and every angle at the largest radius, bound the error of every pair by the sum of theirs. The fast
run takes a sample of either scan, the slow one all of it.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from backends import INSTRUCTION_SETS

from distruction.ops.reference.philox import box_muller as exact_box_muller

ROOT = Path(__file__).parents[1]
BOUND = 2e-6
"""Of either scan: half the contract's."""

FLAGS = {
    "scalar": [],
    "baseline": ["-DVECTOR"],
    "avx2": ["-DVECTOR", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-DVECTOR", "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
PORTION = 2**20


def cpp_normals(instruction_set, folder):
    cpp = pytest.importorskip("distruction.ops.cpp", reason="the C++ kernels were not built")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler (c++, g++, clang++) on PATH")
    if not cpp.instruction_sets().get(instruction_set, (0, False))[1]:
        pytest.skip(f"this CPU has no {instruction_set}")
    path = folder / f"{instruction_set}.so"
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", *FLAGS[instruction_set]]
    source = str(ROOT / "tests" / "box_muller.cpp")
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", source, "-o", str(path)], check=True)
    function = ctypes.CDLL(str(path)).normals

    def run(radius_words, angle_words):
        words = [w.to(torch.int32).contiguous() for w in (radius_words, angle_words)]
        out = [torch.empty(len(radius_words)) for _ in range(3)]
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (*words, *out))
        function(ctypes.c_int64(len(radius_words)), *pointers)
        return out

    return run


def triton_normals(hardware, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    import test_kernels

    if test_kernels.TRITON.unavailable() is not None:
        pytest.skip(test_kernels.TRITON.unavailable())
    test_kernels.let_the_hardware_err(hardware, monkeypatch)
    return test_kernels.our_normals


HARDWARE = ("triton", "triton, logarithm high", "triton, logarithm low")
"""Triton's kernels, and as compiled ones may be: with the hardware's functions at the bounds of their errors."""


@pytest.fixture
def normals(request, tmp_path, monkeypatch):
    if request.param in INSTRUCTION_SETS:
        return cpp_normals(request.param, tmp_path)
    return triton_normals(request.param.partition(", logarithm ")[2], monkeypatch)


@pytest.fixture(params=[pytest.param(499, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def every(request):
    return request.param


def words_of_every_float(lowest, every):
    """Words from ``lowest`` to 2**32 that make every float there is among their conversions, in portions."""
    for bits in range(32):
        first, last, spacing = 2**bits, 2 ** (bits + 1), 2 ** max(0, bits - 23)
        if first < lowest:
            continue
        # The ends of each range, always: there the exponents and the formulas change.
        for start in range(first, last, spacing * every * PORTION):
            words = torch.arange(start, min(last, start + spacing * every * PORTION), spacing * every)
            yield torch.cat([words, torch.tensor([last - 1, last - spacing])])


def padded(words):
    return torch.cat([words, words[-1:].expand(-len(words) % 16)])


@pytest.mark.parametrize("normals", [*INSTRUCTION_SETS, *HARDWARE], indirect=True)
def test_every_radius(normals, every):
    worst = 0.0
    for words in (torch.arange(16), *words_of_every_float(1, every)):
        words = padded(words)
        uniforms, ours, _ = normals(words, torch.zeros_like(words))
        assert torch.equal(uniforms, ((words.double() + 0.5) * 2.0**-32).float())
        exact, _ = exact_box_muller(words, torch.zeros_like(words))
        worst = max(worst, ((ours.double() - exact).abs() / exact.abs().clamp(min=1)).max().item())
    assert worst <= BOUND


@pytest.mark.parametrize("normals", [*INSTRUCTION_SETS, HARDWARE[0]], indirect=True)
def test_every_angle(normals, every):
    # The smallest uniform makes the largest radius.
    zeros = torch.zeros(16, dtype=torch.int64)
    radius, exact_radius = normals(zeros, zeros)[1][0].double(), exact_box_muller(zeros, zeros)[0][0]
    assert radius == pytest.approx(math.sqrt(-2 * math.log(2**-33)), rel=1e-6)
    worst = 0.0
    for positive in (torch.arange(16), *words_of_every_float(1, every)):
        positive = padded(positive[positive < 2**31])
        for words in (positive, 2**32 - positive, positive ^ 1) if len(positive) else ():
            words = words & (2**32 - 1)
            _, *ours = normals(torch.zeros_like(words), words)
            for eps, exact in zip(ours, exact_box_muller(torch.zeros_like(words), words), strict=True):
                worst = max(worst, (eps.double() - exact * (radius / exact_radius)).abs().max().item())
    assert worst <= BOUND
