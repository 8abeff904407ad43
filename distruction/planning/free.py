"""What memory is free on a device."""

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device, or ``None`` where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    if device.type != "cpu":
        return None
    limits = [_free_of_machine(), *(_free_of_group(*pair) for pair in _GROUPS)]
    return min((limit for limit in limits if limit is not None), default=None)


_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Where the two versions of Linux's control groups keep a container's limit and its usage."""


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_group(limit: Path, usage: Path) -> int | None:
    try:
        return max(0, int(limit.read_text()) - int(usage.read_text()))
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return None
