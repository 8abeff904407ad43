"""What a bug report should say of the machine: versions, and which backend serves which device."""

import importlib
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from .ops import backends

PACKAGES = ("distruction", "torch", "triton", "numpy", "safetensors", "timm", "torchvision", "transformers")


def versions() -> dict[str, str]:
    """Of Python and of the packages that are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def report() -> str:
    """Lines to paste into a bug report; nothing in them names a user or a path outside of the package."""
    found_versions = versions()
    lines = [f"python {found_versions['python']}, {platform.system()} {platform.machine()}"]
    lines += [f"{name} {found_versions.get(name, 'not installed')}" for name in PACKAGES]
    found = torch.cuda.is_available()
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    lines.append(f"PyTorch is built for {kind if torch.version.hip or torch.version.cuda else 'the CPU alone'}")
    lines.append(f"GPU: {torch.cuda.get_device_name() if found else 'none found'}")
    for device, names in backends.AUTO.items():
        reasons = {name: backends.unavailable(name, device) for name in names}
        if device != "cpu" and not found:
            lines.append(f"{device}: no device")
        else:
            lines.append(f"{device}: {next(name for name, reason in reasons.items() if reason is None)} serves")
        lines += [f"  {name}: {reason or 'available'}" for name, reason in reasons.items()]
    with suppress(ImportError):
        lines.append(
            f"the CUDA kernels were built by toolkit {importlib.import_module(backends.MODULES['cuda']).toolkit()}"
        )
    return "\n".join(lines)
