"""Peak memory of a block of work, on the GPU or, on Linux, of the process."""

import math
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Peak:
    """Context manager; ``mib`` is then the most memory that the block held beyond the ``before`` bytes, in MiB.

    On CUDA it is of the allocator; elsewhere of resident memory, whose high-water mark Linux lets a process reset; NaN
    where it cannot be known.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mib = self.before = math.nan

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = float(torch.cuda.memory_allocated(self.device))
        else:
            try:
                _CLEAR.write_text("5")  # resets VmHWM, see proc(5)
                self.before = _resident("VmRSS")
            except OSError:
                self.before = math.nan
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            after = float(torch.cuda.max_memory_allocated(self.device))
        else:
            after = _resident("VmHWM")
        self.mib = (after - self.before) / 2**20


def _resident(field: str) -> float:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return math.nan
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), math.nan)
