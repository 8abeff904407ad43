"""The committed counts: the CPU kernels' instructions, and what a whole job costs."""

import json

import pytest

pytest.importorskip("typer", reason="the benchmarks need typer")
from benchmarks import instructions


def test_the_table_of_instructions():
    from distruction.ops import backends

    if (reason := instructions.missing() or backends.unavailable("cpp", "cpu")) is not None:
        pytest.skip(reason)
    from distruction.ops import cpp

    if not cpp.instruction_sets().get("avx2", (0, False))[1]:
        pytest.skip("this CPU has no avx2")
    committed = json.loads(instructions.RESULTS.read_text())
    if committed["compiler"] != instructions.compiler():
        pytest.skip(f"the table is of {committed['compiler']}, which is not here")
    found = instructions.measure()
    assert found.keys() == committed["instructions per element"].keys()
    assert found == pytest.approx(committed["instructions per element"], rel=0.05)
    # An update in pairs costs less than one by sums, in each of its calls.
    assert found["accumulate, pair"] < found["accumulate, first sample"]
    assert found["step, pair"] <= found["step, sums"]


def test_the_shares_of_a_whole_job():
    whole_job = pytest.importorskip("benchmarks.whole_job", reason="the benchmarks need timm and typer")
    # A pass of 100 seconds; by hand from the defaults: 150 steps of preparation against 50,000 / 64 of training.
    shares = whole_job.job({"prepare": 1.0, "forget": 7.0, "adamw": 2.0}, 100.0)
    assert shares["optimizer / pass, prepare"] == pytest.approx(0.01)
    assert shares["optimizer / passes, forget"] == pytest.approx(0.03)
    assert shares["prepare / epoch of CIFAR-100"] == pytest.approx(150 * 101 / (781.25 * 102))
    assert shares["forget / epoch of ImageNet-1k"] == pytest.approx(150 * (700 / 3 + 7) / (1281167 / 64 * 102))


def test_a_pass_counts_the_published_multiplications():
    whole_job = pytest.importorskip("benchmarks.whole_job", reason="the benchmarks need timm and typer")
    # ViT-B/16 at 224: 17.6 G multiplications and additions,
    # two FLOPs each, once forward and twice backward but for the gradient of the images.
    flops = whole_job.flops_of_a_pass("vit_base_patch16_224")
    assert flops == pytest.approx(64 * 6 * 17.6e9, rel=0.03)


def test_the_bytes_of_the_optimizers_are_the_kernels_budgets():
    pytest.importorskip("triton", reason="Triton is not installed")
    budgets, whole_job = (pytest.importorskip(f"benchmarks.{name}") for name in ("budgets", "whole_job"))
    assert budgets.VARIANTS["gauss_newton"].bytes == whole_job.PREPARE
    assert sum(budgets.VARIANTS[f"{op}, pair"].bytes for op in ("accumulate", "step")) == whole_job.FORGET
