"""What ``distruction doctor`` says, against what the backends themselves do."""

import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from distruction import doctor
from distruction.cli import app
from distruction.ops import backends, native


def test_the_command_names_versions_and_the_backend_that_serves():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert f"torch {torch.__version__.split('+')[0]}" in result.output
    name = next(n for n, module in backends.MODULES.items() if module == backends.resolve("auto", "cpu").__name__)
    assert f"cpu: {name} serves" in result.output


def test_it_says_why_another_backend_does_not_serve(monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda n, device: None if n == "reference" else "lost in transit")
    lines = doctor.report().splitlines()
    assert "cpu: reference serves" in lines
    assert "  cpp: lost in transit" in lines


def test_the_toolkit_of_the_cuda_kernels_is_named(monkeypatch):
    """``CUDART_VERSION`` is 1000 times the version and 10 times the release."""
    name = "distruction.ops.cuda"
    sys.modules.pop(name, None)
    library = types.SimpleNamespace(
        **{f"distruction_cuda_{n}": types.SimpleNamespace(restype=None) for n in ("error", "chunks")},
        distruction_cuda_toolkit=lambda: 12090,
    )
    monkeypatch.setattr(native, "load", lambda *_: library)
    try:
        assert "the CUDA kernels were built by toolkit 12.9" in doctor.report().splitlines()
    finally:
        sys.modules.pop(name, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_is_said_to_serve_it():
    assert "cuda: no device" in doctor.report()
