"""The build: without compilers, with them, under the sanitizers, and the CUDA kernels' resources."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {"sm_80", "sm_90", "sm_100"}


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, to build in."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "distruction", "kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(command, cwd, **environment):
    inherited = {k: v for k, v in os.environ.items() if not re.match("CXX|CC$|NVCC|CUDA_|DISTRUCTION_|PYTHONPATH", k)}
    return subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)


def build(tree, **environment):
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, **environment)


def wheel(tree, **environment):
    code = "import setuptools.build_meta as backend; print(backend.build_wheel('dist'))"
    result = run([sys.executable, "-c", code], tree, **environment)
    assert result.returncode == 0, result.stderr
    return tree / "dist" / result.stdout.split()[-1], result


def library(tree, name="cpu"):
    return tree / "distruction" / "ops" / f"libdistruction_{name}.so"


needs_cxx = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler (c++, g++, clang++) on PATH"
)
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ, reason="no nvcc on PATH and no CUDA_HOME"
)


def test_without_a_compiler_the_wheel_falls_back_with_one_warning(tree):
    path, result = wheel(tree, PATH="/nonexistent")
    said = [line for line in result.stderr.splitlines() if "was built without" in line]
    assert len(said) == 1
    assert re.search("no C.. compiler.*plain PyTorch serves CPU tensors.*nvcc was not found", said[0])
    installed = tree / "installed"
    with zipfile.ZipFile(path) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
        archive.extractall(installed)
    code = (
        "import torch, distruction\n"
        "p = torch.nn.Parameter(torch.zeros(3))\n"
        "opt = distruction.BGD([p])\n"
        "opt.train()\n"
        "for _ in range(2):\n"
        "    p.square().sum().backward()\n"
        "    opt.step()\n"
        "print(distruction.__file__)\n"
    )
    result = run([sys.executable, "-W", "always", "-c", code], installed)
    assert result.stdout.startswith(str(installed)), result.stderr
    said = [line for line in result.stderr.splitlines() if "DistructionWarning" in line and "many times slower" in line]
    assert len(said) == 1
    assert "install a C++ compiler" in said[0]


def test_a_build_that_was_asked_for_is_an_error_without_a_compiler(tree):
    result = build(tree, PATH="/nonexistent", DISTRUCTION_BUILD_CPU="1")
    assert result.returncode != 0
    assert "no C++ compiler (c++, g++, clang++) was found" in result.stderr


def test_a_compiler_that_fails_is_left_out_with_its_reason(tree):
    result = build(tree, CXX="false", DISTRUCTION_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "warning: distruction was built without libdistruction_cpu.so" in result.stderr
    assert not library(tree).exists()


@needs_cxx
def test_one_wheel_serves_every_python_and_pytorch(tree):
    path, result = wheel(tree, DISTRUCTION_BUILD_CUDA="0")
    assert "was built without" not in result.stderr
    platform = re.sub("[-.]", "_", sysconfig.get_platform())
    assert path.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tree / "installed")
    assert "distruction/ops/libdistruction_cpu.so" in names
    assert "distruction/kernels/__init__.py" in names
    assert not [n for n in names if n.startswith(("csrc", "tests", "benchmarks"))]
    linked = [line.split()[0] for line in run(["ldd", str(library(tree / "installed"))], tree).stdout.splitlines()]
    assert [name for name in linked if name.startswith("libc.")]
    assert not [name for name in linked if re.search("torch|python|c10", name)]
    pytest.importorskip("auditwheel")
    shown = run([sys.executable, "-m", "auditwheel", "show", str(path)], tree)
    # A tag of PEP 600 means that nothing is linked but what every distribution of that age has.
    assert re.search(r'platform tag:\s+"manylinux_2_\d+_', shown.stdout), shown.stdout + shown.stderr


def test_the_optimizer_needs_no_more_than_pytorch_numpy_and_safetensors(tmp_path):
    code = (
        "import sys, numpy, safetensors.torch, torch\n"
        "before = set(sys.modules)\n"
        "import distruction\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "opt = distruction.BGD([('p', p)])\n"
        "opt.train()\n"
        "p.square().sum().backward()\n"
        "opt.step()\n"
        "opt.eval()\n"
        "opt.posterior().save(sys.argv[1])\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))\n"
    )
    result = run([sys.executable, "-c", code, str(tmp_path / "p.safetensors")], ROOT)
    assert result.returncode == 0, result.stderr
    others = {"torchvision", "timm", "sklearn", "scipy", "matplotlib", "typer", "rich", "jinja2", "filelock"}
    assert not others & set(result.stdout.split())


@needs_nvcc
def test_cuda_kernels_keep_their_budget(tree):
    """No spills and at most 64 registers, so that a multiprocessor holds four thread blocks of 256."""
    result = build(tree, DISTRUCTION_BUILD_CPU="0", DISTRUCTION_BUILD_CUDA="1", NVCCFLAGS="-Xptxas=-v")
    assert result.returncode == 0, result.stderr
    report = result.stdout + result.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    assert {architecture for _, architecture, *_ in kernels} == ARCHITECTURES
    assert len(kernels) == 15 * len(ARCHITECTURES)
    over = [k for k in kernels if int(k[2]) or int(k[3]) or int(k[4]) > 64]
    assert not over
    release = re.search(r"release (\d+)\.(\d+)", run(["nvcc", "--version"], tree).stdout)
    built_by = ctypes.CDLL(str(library(tree, "cuda"))).distruction_cuda_toolkit()
    assert built_by == 1000 * int(release[1]) + 10 * int(release[2])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.slow
def test_kernels_pass_the_sanitizers(tree):
    """The kernels' own tests with AddressSanitizer (PyTorch's allocations included) and UBSan."""
    sanitizers = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    result = build(tree, CXX=f"g++ {sanitizers}", CXXFLAGS="-O1 -g", DISTRUCTION_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    runtime = [run(["g++", f"-print-file-name=lib{n}.so"], tree).stdout.strip() for n in ("asan", "ubsan", "stdc++")]
    # A write past the end, to know that the sanitizer is at work.
    probe = (
        "import torch; from distruction.ops import cpp; x = torch.zeros(5); y = torch.zeros(64)\n"
        "from distruction.ops import Draws, State\n"
        "draws = Draws([0], [0], 1, torch.zeros(3, dtype=torch.int64))\n"
        "m, _keep = cpp.native.model(State([y], [y]), draws, param=[x])\n"
        "cpp._kernels.launch('sample', m, x.device, {}, {})\n"
    )
    environment = {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    caught = run([sys.executable, "-c", probe], tree, **environment)
    assert re.search("ERROR: AddressSanitizer(.|\n)*sample_piece", caught.stderr), caught.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_cpp.py"]
    result = run(command, tree, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed", result.stdout)
