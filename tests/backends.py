"""The one table of backends in tests: every entry has to pass the same matrix of ops."""

from dataclasses import dataclass

import pytest
import torch

from distruction.ops import backends

INSTRUCTION_SETS = ("scalar", "baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Backend:
    """A way to run the ops: a backend's name, the device of the tensors, and for C++ its instruction set."""

    name: str
    device: str
    instruction_set: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.name, self.device, self.instruction_set)))

    def unavailable(self) -> str | None:
        """Why it cannot run here."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA or ROCm device"
        reason = backends.unavailable(self.name, self.device)
        if reason is None and self.instruction_set:
            from distruction.ops import cpp

            if not cpp.instruction_sets()[self.instruction_set][1]:
                return f"this CPU has no {self.instruction_set}"
        return reason


TABLE = (
    *(Backend("cpp", "cpu", name) for name in INSTRUCTION_SETS),
    Backend("triton", "cpu"),
    Backend("triton", "cuda"),
    Backend("cuda", "cuda"),
)
"""The C++ kernels for every instruction set, Triton interpreted and compiled, and CUDA. The oracle is no entry."""

PARAMETERS = [pytest.param(b, id=str(b), marks=[pytest.mark.gpu] if b.device == "cuda" else []) for b in TABLE]
