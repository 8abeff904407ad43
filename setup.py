"""Builds the optional kernels of ``csrc/``; everything else is declared in pyproject.toml.

The kernels are plain shared libraries without PyTorch's or Python's headers, so they build in pip's isolated
environment, and one wheel serves every version of both. What cannot be built is left out with a warning.

DISTRUCTION_BUILD_CPU, DISTRUCTION_BUILD_CUDA: 0 leaves the kernels out, 1 makes it an error if they cannot be
    built. Otherwise: the CPU's if there is a C++ compiler; CUDA's if there is nvcc, unless the PyTorch that is
    visible to the build is one without CUDA.
DISTRUCTION_CUDA_ARCHITECTURES: compute capabilities, default "80 90 100"; the last one's PTX is included.
CXX, NVCC, CXXFLAGS, NVCCFLAGS: the compilers and flags to add.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU = "distruction.ops.libdistruction_cpu"
CUDA = "distruction.ops.libdistruction_cuda"
SERVES_INSTEAD = {
    CPU: "plain PyTorch serves CPU tensors, many times slower",
    CUDA: "Triton serves CUDA tensors, or plain PyTorch where it is missing",
}
# No value that a kernel computes depends on errno or on floating-point exceptions.
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
X86_FLAGS = {
    "avx512.cpp": [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    "avx2.cpp": AVX2_FLAGS,
}
NVCC_FLAGS = ["-std=c++17", "-O3", "-shared", "-prec-div=false", "-prec-sqrt=false", "-ftz=true", "--threads=0"]


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p) for p in Path("csrc", folder).iterdir() if p.suffix in suffixes)


def run(command: list[str]) -> None:
    """Run a compiler.

    Raises:
        CompileError: it failed or is missing.
    """
    print(shlex.join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(str(error)) from error


def cxx() -> list[str]:
    """The C++ compiler's command."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise CompileError("no C++ compiler (c++, g++, clang++) was found")
    return [found]


def nvcc() -> str:
    """The path of nvcc."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates = [os.environ.get("NVCC"), *(os.path.join(home, "bin", "nvcc") for home in homes), "nvcc"]
    found = next(filter(None, (shutil.which(c) for c in candidates if c)), None)
    if found is None:
        raise CompileError("nvcc was not found in NVCC, CUDA_HOME or PATH")
    return found


def torch_without_cuda() -> bool:
    """Whether this interpreter sees a PyTorch that cannot use CUDA; pip's build isolation hides it."""
    try:
        import torch
    except Exception:
        return False
    return torch.version.cuda is None


class BuildKernels(build_ext):
    """Compiles each library with the compilers' own command lines, since flags differ from file to file.

    Always anew: a stale object would be worse than the seconds that it saves.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        left_out = []
        for ext in self.extensions:
            choice = os.environ.get("DISTRUCTION_BUILD_" + ext.name.rsplit("_", 1)[1].upper())
            output = Path(self.get_ext_fullpath(ext.name))
            output.parent.mkdir(parents=True, exist_ok=True)
            output.unlink(missing_ok=True)
            if choice == "0":
                continue
            try:
                (self.build_cpu if ext.name == CPU else self.build_cuda)(ext, output, forced=choice == "1")
            except CompileError as error:
                if choice == "1":
                    raise
                left_out.append(f"{output.name} ({error}; {SERVES_INSTEAD[ext.name]})")
        if left_out:
            print(f"warning: distruction was built without {' and '.join(left_out)}", file=sys.stderr)

    def build_cpu(self, ext: Extension, output: Path, forced: bool) -> None:
        compiler = cxx()
        folder = Path(self.build_temp, "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        files = [Path(s) for s in ext.sources if x86 or Path(s).name not in X86_FLAGS]
        flags = [*COMMON_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]

        def compile_file(source: Path) -> str:
            target = str(folder / source.with_suffix(".o").name)
            run([*compiler, *flags, *X86_FLAGS.get(source.name, []), "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_file, files))
        run([*compiler, "-shared", "-pthread", *objects, "-o", str(output)])

    def build_cuda(self, ext: Extension, output: Path, forced: bool) -> None:
        if not forced and torch_without_cuda():
            raise CompileError("the installed PyTorch is a build without CUDA")
        architectures = re.findall(r"\d+a?", os.environ.get("DISTRUCTION_CUDA_ARCHITECTURES", "80 90 100"))
        generate = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        generate.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
        host = "-Xcompiler=-fPIC,-fvisibility=hidden"
        extra = shlex.split(os.environ.get("NVCCFLAGS", ""))
        run([nvcc(), *NVCC_FLAGS, host, *generate, *extra, *ext.sources, "-o", str(output)])


class PlatformWheel(bdist_wheel):
    """The libraries depend on the platform, not on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        # Optional: setuptools does not miss a library that was left out.
        Extension(CPU, sources("cpu", ".cpp"), optional=True),
        Extension(CUDA, sources("cuda", ".cu"), optional=True),
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
